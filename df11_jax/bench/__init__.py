"""`df11-jax bench` and `df11-jax compare`: how fast a device decodes, and generates text."""
