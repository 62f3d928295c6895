"""Deployed models: images, runners (containers and processes), probes, replicas, clean-up.

Not here: the API around them, which belongs in `services`.
"""
