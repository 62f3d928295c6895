"""What every step shares: paths, the command line, locks, processes, waiting.

Nothing here knows about models, TorchServe, Docker or Google.
"""
