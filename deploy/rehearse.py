"""The whole life of a deployment on the stand-in for Vertex AI: `make rehearse`.

    python -m deploy.rehearse smollm2-135m

Runs the commands that `make plan`, `make deploy`, ... run, in processes of their own that know
nothing of the stand-in but its environment variables. Then it counts what they asked.
"""
