"""FedMITR: one-shot federated learning with vision transformers, from one upload to one global model."""

__version__ = "0.2.0"
