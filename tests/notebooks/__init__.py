"""Tests of what chapters and documents promise, read from the files.

Running the chapters is `pytest --nbval notebooks`.
"""
