"""The documents: their generated parts, and the course as a website.

Pages are in `pages/`. Tables and values are computed in `benchmarks.report`.
"""
