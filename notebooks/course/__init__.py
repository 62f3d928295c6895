"""What only the chapters use: progress bars, tables, figures.

A function that the handler or the deployer needs belongs there, not here.
"""
