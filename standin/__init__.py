"""A local, strict stand-in for Vertex AI, for tests, chapters and rehearsals.

Here: starting it (`local`, `program`) and what its rooms share (errors, limits, journal, settings).
Requests enter by `doors`, `services` handle them, `replicas` run models. Not here: code that talks
to Google, which belongs in `deploy.vertex`; the stand-in shares no tables with that code.
"""
