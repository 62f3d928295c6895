"""Vertex AI's methods: models, endpoints, operations, predictions.

Protocols belong in `doors`, running containers in `replicas`.
"""
