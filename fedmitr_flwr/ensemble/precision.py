"""How inversion runs the teachers: in which precision, and compiled or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ..config import InversionConfig
from ..vit.tokens import ClassAnswer, forward_cls
from .teachers import Question

VERSIONS = 64  # of the compiled network: stages · 2, for dense and sparse batches of several sizes


def class_question(config: InversionConfig, device: torch.device) -> Question:
    """`forward_cls` as `config.precision` and `config.compile` want it; answers and gradients are float32 always."""
    question = _compiled() if config.compile else forward_cls
    if config.precision != "bfloat16":
        return question

    def in_bfloat16(vit: torch.nn.Module, patches_BKE: Tensor, positions_BK: Tensor) -> ClassAnswer:
        with torch.autocast(device.type, torch.bfloat16):
            logits, attention = question(vit, patches_BKE, positions_BK)
        return ClassAnswer(logits.float(), attention.float())

    return in_bfloat16


@cache
def _compiled() -> Question:
    """One static shape at a time: each stage of an inversion has its own, and none has a varying one.

    Teachers of one architecture share the compiled code. Each stage needs two versions, with and without gradient; past
    torch's own limit of versions it would go on uncompiled without a word.
    """
    torch._dynamo.config.recompile_limit = max(VERSIONS, torch._dynamo.config.recompile_limit)
    compiled: Question = torch.compile(forward_cls, dynamic=False)
    return compiled


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Say explicitly whether CUDA may round the inputs of float32 products, and of convolutions, to 10 bits."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
