"""`x @ w` for weights with a fixed fan-in."""
