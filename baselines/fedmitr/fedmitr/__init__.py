"""FedMITR, on the package fedmitr-flwr."""
