"""Deploy an image on Vertex AI: settings, plan, resources, deployer, capacity.

Nothing here knows whether Google or the stand-in answers.
"""
