"""Tests of single modules, without TorchServe and without containers.

What modules must do together over HTTP belongs in `tests/served`.
"""
