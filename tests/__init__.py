"""Tests of everything; `python -m tests` runs them in parts.

Here: what several folders share. A test belongs in the folder that says what it needs to run.
"""
