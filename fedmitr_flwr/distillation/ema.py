"""The moving average of the student's weights over the steps of distillation (Tarvainen & Valpola 2017) [C]."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """w̄ ← d w̄ + (1 - d) w after each step; w̄ is w after the first one. The student itself trains on from w.

    d = min(decay, (1 + t) / (10 + t)) with t the steps that w̄ has seen (TensorFlow's ExponentialMovingAverage [C]), so
    that also of few steps the average is over their last part. `decay` = 1 leaves d to this alone, whatever the number
    of steps. 0 is off: nothing is kept and nothing is written. Only parameters are averaged: the transformers that
    `build_vit` lets pass have no buffers.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Take in the weights after one more step."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, weight in student.named_parameters():
            self.mean[name] = self.mean[name].lerp_(weight, 1 - decay) if self.steps else weight.clone()
        self.steps += 1

    @torch.no_grad()
    def write(self, student: nn.Module) -> None:
        """Give the average to `student`; when off, or before the first step, it stays as it is."""
        if self.steps:
            for name, weight in student.named_parameters():
                weight.copy_(self.mean[name])

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on beside the student; nothing when off."""
        if not self.steps:
            return {}
        return {"steps": torch.tensor(self.steps), **{f"mean.{name}": mean for name, mean in self.mean.items()}}

    def restore(self, state: Mapping[str, Tensor], student: nn.Module) -> None:
        """Go on where another average, of the same decay and network, gave this `state`; on the student's device."""
        if state:
            self.steps = int(state["steps"])
            self.mean = {name: state[f"mean.{name}"].to(w, copy=True) for name, w in student.named_parameters()}
