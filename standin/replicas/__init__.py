"""Deployed models: images, containers or processes, probes, routing.

The API around them belongs in `services`.
"""
