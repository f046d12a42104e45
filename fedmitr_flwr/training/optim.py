"""One optimisation step, shared by local training and distillation."""

import math
from collections.abc import Iterable, Mapping
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
        self.factor = lambda step: _factor(step, total_steps, config.schedule)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)
        self.grad_clip = config.grad_clip

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        if self.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()
        self.schedule.step()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on beside the parameters: how many were made, and moments."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"{number}.{name}": value for number, of_one in state.items() for name, value in of_one.items()}
        return {"steps": torch.tensor(self.schedule.last_epoch), **moments}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another stepper, of the same settings and parameters, gave this `state`."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            number, _, name = key.partition(".")
            if name:
                moments.setdefault(int(number), {})[name] = value.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        steps = int(state["steps"])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor, last_epoch=steps - 1)


def _factor(step: int, total: int, schedule: str) -> float:
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
