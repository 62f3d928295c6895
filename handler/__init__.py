"""What runs inside the model server.

Nothing in this package imports `deploy` or the notebooks: `deploy/archive.py` copies it into the
archive as it is, and the same files are imported by the tests and shown in the chapters.
"""
