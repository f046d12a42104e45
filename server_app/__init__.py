"""Flower, server side."""
