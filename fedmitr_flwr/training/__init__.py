"""The client's half: training on its own images, and what it uploads."""
