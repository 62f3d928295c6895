"""From `benchmarks/results/*.json` to tables and figures.

Nothing here measures.
"""
