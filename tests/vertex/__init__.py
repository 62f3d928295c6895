"""Tests of the deployer and of the stand-in, with Google's SDK, gcloud and curl.

What needs no server, such as changes and settings, belongs in `tests/unit`.
"""
