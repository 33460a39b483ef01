"""The command line, `df11-jax`: a module for each command."""
