"""Measure: systems, load shapes, results.

Tables and figures made from the results belong in `report`.
"""
