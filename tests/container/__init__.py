"""Tests of the image and its container; they need Docker or podman.

Deploying the image belongs in `tests/vertex`.
"""
