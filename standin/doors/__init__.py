"""How requests enter: the HTTPS proxy, REST, gRPC, and who may call.

What a method does belongs in `services`.
"""
