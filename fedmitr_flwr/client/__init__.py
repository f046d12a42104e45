"""A client's training on its own images."""
