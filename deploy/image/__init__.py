"""Build, run, push and measure an APP's container image.

What the image holds is declared in `docker/Dockerfile`; Vertex AI's side belongs in `vertex`.
"""
