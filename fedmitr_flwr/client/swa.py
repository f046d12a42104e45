"""Stochastic weight averaging at the client (Izmailov et al. 2018) [C]."""

import torch
from torch import Tensor, nn


def averaged_epochs(share: float, epochs: int) -> int:
    """How many of the last epochs enter the mean: `share` of them, rounded."""
    return int(share * epochs + 0.5)


class WeightMean:
    """The mean of a network's weights at several moments, summed in float64 so that one moment gives itself back.

    Only parameters are averaged. Buffers stay as they are last: a mean of statistics, or of a counter, would belong to
    no network. The transformers that `build_vit` lets pass have none.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, network: nn.Module) -> None:
        if not self.count:
            self.sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in network.parameters()]
        for total, weight in zip(self.sums, network.parameters(), strict=True):
            total += weight
        self.count += 1

    @torch.no_grad()
    def write(self, network: nn.Module) -> None:
        """Give the mean to `network`, in its own precision; without any moment it stays as it is."""
        if self.count:
            for weight, total in zip(network.parameters(), self.sums, strict=True):
                weight.copy_(total / self.count)
