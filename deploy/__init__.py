"""From weights to a running endpoint: every step is a function here and a target in the Makefile."""
