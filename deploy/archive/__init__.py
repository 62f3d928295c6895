"""Turn weights into what TorchServe loads: export, compress, pack.

The handler's own code lives in `handler`; starting a server belongs in `torchserve`.
"""
