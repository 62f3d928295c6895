"""Start, watch, call and stop TorchServe on this machine.

The container uses `launch.py`, too. Building images belongs in `image`.
"""
