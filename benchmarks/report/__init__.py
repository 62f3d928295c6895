"""Tables, single values and plots, made from `benchmarks/results/*.json`.

Nothing here measures, and nothing but `plots` imports matplotlib.
"""
