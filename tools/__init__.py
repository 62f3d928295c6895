"""Set-up and lock of this repository, run before anything is installed: standard library only.

A running deployment needs none of it. One part of `deploy` does: the build of an image asks
`setup_env` where pip finds a local wheel of torch.
"""
