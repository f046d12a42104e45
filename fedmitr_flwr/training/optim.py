"""One optimisation step, shared by local training and distillation."""

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn


class OptimConfig(Protocol):
    """The settings that `Stepper` reads; `LocalConfig` and `DistillConfig` have them."""

    @property
    def optimizer(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def grad_clip(self) -> float: ...


class Stepper:
    """Gradient step with clipping and a learning rate that is constant, or falls to 0 as a half cosine.

    Weight decay spares biases, norms (1 axis), class tokens and positions (3 axes), as timm's `no_weight_decay` does.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimConfig, total_steps: int) -> None:
        self.parameters = list(parameters)
        groups = [
            {"params": [p for p in self.parameters if p.dim() in (2, 4)], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.dim() not in (2, 4)], "weight_decay": 0.0},
        ]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=config.lr)
            if config.optimizer == "adamw"
            else torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _factor(step, total_steps, config.schedule)
        )
        self.grad_clip = config.grad_clip

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        if self.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()
        self.schedule.step()


def _factor(step: int, total: int, schedule: str) -> float:
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
