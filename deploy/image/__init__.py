"""Build, run, push and measure an APP's container image.

`docker/Dockerfile` declares what the image holds. Deploying it on Vertex AI belongs in `vertex`.
"""
