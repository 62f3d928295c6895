"""How requests enter: the HTTPS proxy, REST and gRPC, URLs, accounts and permissions.

Not here: what a method does, which belongs in `services`.
"""
