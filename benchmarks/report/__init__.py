"""Tables, single values and plots, made from `benchmarks/results/*.json`.

Nothing here measures, and only `plots` imports matplotlib.
"""
