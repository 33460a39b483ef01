"""`df11-jax bench`: how fast this device decompresses, and how much of what its memory allows."""
