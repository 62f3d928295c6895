"""A local Vertex AI, strict enough to rehearse a deployment on; see README.md in this folder."""
