"""From weights to a running endpoint: each step a function here and a target in the Makefile."""
