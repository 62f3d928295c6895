"""Measurements: the systems compared, the load, the programs that measure, and their results.

Nothing here draws or writes documents; `report` makes tables, values and plots from results, and
`docs.generate` puts them into the documents.
"""
