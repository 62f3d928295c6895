"""From weights to a running endpoint: one package for each step, one function for each task.

Each step has a main that `make` calls. Code that runs inside the model server belongs in `handler`,
code that plays Google in `standin`.
"""
