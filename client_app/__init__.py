"""Flower, client side."""
