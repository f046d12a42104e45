"""Flower, client side."""

from importlib.metadata import version

from fedmitr_flwr import releases

releases.require(version("flwr"))  # before anything is imported from it
