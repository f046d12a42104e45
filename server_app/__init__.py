"""Flower, server side."""

import flwr

from fedmitr_flwr.common import releases

releases.require(flwr.__version__)  # before anything newer is imported from it
