"""Start, watch, call and stop TorchServe on this machine.

The container shares `launch.py`. Building images belongs in `image`.
"""
