"""Vertex AI's methods: models, endpoints, operations, predictions; names, lists and messages.

Not here: protocols and permissions, which belong in `doors`; running model servers, in `replicas`.
"""
