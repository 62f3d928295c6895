"""Deploy an image on Vertex AI: settings, state, changes, the deployer, capacity planning.

Nothing here knows whether Google or the stand-in answers. How an image is built and what runs in
it belongs to `deploy.image` and `handler`.
"""
