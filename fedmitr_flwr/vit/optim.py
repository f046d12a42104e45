"""One optimisation step, shared by local training and distillation."""

import math
from collections.abc import Iterable, Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..config import LocalConfig

WEIGHT_DECAY = 0.05  # as DeiT (Touvron et al. 2021); none at all gave the same accuracy (docs/LOG.md)
GRAD_CLIP = 1.0  # of the norm of all gradients together, as ViT (Dosovitskiy et al. 2021)


class Stepper:
    """Gradient step with clipping and a learning rate that falls to 0 as a half cosine.

    Weight decay spares biases, norms (1 axis), class tokens and positions (3 axes), as timm's `no_weight_decay` does.
    With another `head_lr`, those of the `parameters` that are the `head` start from that rate in place of `lr`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: str,
        lr: float,
        total_steps: int,
        head: Iterable[nn.Parameter] = (),
        head_lr: float = 0.0,
    ) -> None:
        assert lr, "a learning rate of 0 is to be resolved first"
        self.parameters = list(parameters)
        apart = list(head) if head_lr not in (0, lr) else []
        body = [parameter for parameter in self.parameters if all(parameter is not other for other in apart)]
        self.optimizers = _optimizers(body, optimizer, lr)
        if apart:  # never by Muon
            self.optimizers.append(_by_numbers(apart, optimizer, head_lr))
        self.factor = lambda step: _factor(step, total_steps)
        self.schedules = [LambdaLR(each, self.factor) for each in self.optimizers]

    def step(self, loss: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, GRAD_CLIP)
        self.advance()

    def advance(self) -> None:
        """The step itself, by the gradients that are there."""
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on beside the parameters: how many were made, and moments."""
        moments = {
            f"{which}.{number}.{name}": value
            for which, optimizer in enumerate(self.optimizers)
            for number, of_one in optimizer.state_dict()["state"].items()
            for name, value in of_one.items()
        }
        return {"steps": torch.tensor(self.schedules[0].last_epoch), **moments}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another stepper, of the same settings and parameters, gave this `state`."""
        moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for key, value in state.items():
            which, _, rest = key.partition(".")
            number, _, name = rest.partition(".")
            if name:
                moments[int(which)].setdefault(int(number), {})[name] = value.clone()
        for optimizer, of_all in zip(self.optimizers, moments, strict=True):
            optimizer.load_state_dict({"state": of_all, "param_groups": optimizer.state_dict()["param_groups"]})
        steps = int(state["steps"])
        self.schedules = [LambdaLR(optimizer, self.factor, last_epoch=steps - 1) for optimizer in self.optimizers]


def client_stepper(vit: VisionTransformer, local: LocalConfig, total_steps: int) -> Stepper:
    """Of a client's training: all of `vit`, and its head by `local.head_lr`."""
    assert local.resolved, "local.* has settings that are to be resolved first"
    return Stepper(vit.parameters(), local.optimizer, local.lr, total_steps, vit.head.parameters(), local.head_lr)


def _optimizers(parameters: list[nn.Parameter], name: str, lr: float) -> list[Optimizer]:
    """One for all parameters; with `muon`, Muon (Jordan et al. 2024) for the matrices and AdamW for the rest.

    Muon's steps are scaled to the usual size of AdamW's (Liu et al. 2025, "match_rms_adamw"), so that one rate does.
    """
    if name != "muon":
        return [_by_numbers(parameters, name, lr)]
    matrices, others = [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, _by_numbers(others, name, lr)]


def _by_numbers(parameters: list[nn.Parameter], name: str, lr: float) -> Optimizer:
    """SGD where that is wanted, else AdamW: each number has a step of its own."""
    groups = [
        {"params": [p for p in parameters if p.dim() in (2, 4)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() not in (2, 4)], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=lr)


def _factor(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
