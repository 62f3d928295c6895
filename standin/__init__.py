"""A local, strict stand-in for Vertex AI, for tests, chapters and rehearsals.

It shares no tables with the deployer that it tests. Code that talks to Google belongs in
`deploy.vertex`.
"""
