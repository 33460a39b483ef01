"""A small language model on compressed weights: train it, generate with it, compare every bit."""
