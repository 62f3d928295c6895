"""Set-up and lock of this repository, run before anything is installed: standard library only.

Nothing that a deployment needs belongs here.
"""
