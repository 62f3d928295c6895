"""Tests with a real TorchServe on this machine.

Tests of its container belong in `tests/container`.
"""
