"""Training at the client by DP-SGD (Abadi et al. 2016) [C]: the weights tell little of any one image.

Clipping, noise, Poisson sampling and the accounting of what is spent are opacus'. Gradients of single images come from
`torch.func`, since the network is asked for patches and not called as a module, which opacus' hooks would need.

Shapes: B images of a batch, N patches, E numbers in a patch.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.errors import ConfigError
from ..config import Config
from ..data.images import Images, prepare
from ..vit.optim import client_stepper
from ..vit.tokens import all_positions, ask_with, forward_tokens, patchify
from .losses import label_loss
from .train import shift_and_flip

log = logging.getLogger("fedmitr")

TOGETHER = 32  # gradients of so many single images are in memory at once


def require_opacus(config: Config) -> None:
    """Raise ConfigError where private training is wanted and its library is not there."""
    if config.privacy.epsilon and importlib.util.find_spec("opacus") is None:
        raise ConfigError(
            f"privacy.epsilon = {config.privacy.epsilon} needs opacus at every client; "
            "run there: pip install 'fedmitr-flwr[privacy]', or pip install opacus"
        )


def train_privately(
    vit: VisionTransformer,
    images: Images,
    config: Config,
    secret: torch.Generator,
    device: torch.device,
    prox_mu: float = 0.0,
    on_epoch: Callable[[], None] = lambda: None,
) -> float:
    """Train `vit` in place, as `train_local` does but for its clipping; return the ε that was spent at δ.

    Two data sets are neighbours if one has an image more, whose place is empty in the other: the number of images
    counts as public.

    Args:
        vit: at the public start.
        images: the client's own.
        config: `privacy` says how much may be spent.
        secret: of all that is drawn here, on the CPU: noise, choice of images, shifts. Whoever can repeat it can take
            the noise away.
        device: where to train.
        prox_mu: FedProx's μ.
        on_epoch: called as often as there are epochs; without a loss, which would be of the images.
    """
    require_opacus(config)
    local, privacy = config.local, config.privacy
    if privacy.delta * len(images) >= 1:
        raise ConfigError(
            f"privacy.delta = {privacy.delta:g} promises nothing to one of {len(images)} images; "
            f"use less than 1 / {len(images)}"
        )
    vit.to(device).train()
    expected = min(local.batch_size, len(images))
    batches = -(-len(images) // expected)
    steps, rate = local.epochs * batches, expected / len(images)
    noise = noise_for(config, rate, steps)
    start = [weight.detach().clone() for weight in vit.parameters()] if prox_mu else []
    stepper = client_stepper(vit, local, steps)
    mechanism = _mechanism(vit, noise, privacy.clip, expected, secret)
    for step, chosen in enumerate(_sampler(len(images), rate, steps, secret), 1):
        # For every image, chosen or not: what one is given says nothing of the others.
        seeds = torch.randint(2**32, (len(images),), generator=secret)
        # At least one part, if only of no images: a step without images has its noise, too.
        for part in torch.tensor(chosen, dtype=torch.long).split(TOGETHER):
            _give_gradients(vit, images.subset(part), seeds[part], config)
            mechanism.clip_and_accumulate()
        mechanism.add_noise()
        mechanism.scale_grad()
        if prox_mu:  # of the weights alone: nothing to hide
            _pull(vit, start, prox_mu)
        stepper.advance()
        mechanism.zero_grad()
        if not step % batches:
            on_epoch()
    vit.eval()
    spent = epsilon_of(noise, rate, steps, privacy.delta)
    log.info("private training: ε = %.3f at δ = %g, %d steps with noise %.3f", spent, privacy.delta, steps, noise)
    return spent


def noise_for(config: Config, rate: float, steps: int) -> float:
    """The noise multiplier with which so many steps at this sampling rate spend `privacy.epsilon`."""
    from opacus.accountants.utils import get_noise_multiplier

    privacy = config.privacy
    limits = {"target_epsilon": privacy.epsilon, "target_delta": privacy.delta}
    try:
        with _any_order():
            noise: float = get_noise_multiplier(**limits, sample_rate=rate, steps=steps, accountant="rdp")
    except ValueError as error:
        raise ConfigError(
            f"privacy.epsilon = {privacy.epsilon} cannot be kept in {steps} steps; raise it, or lower local.epochs"
        ) from error
    return noise


def epsilon_of(noise: float, rate: float, steps: int, delta: float) -> float:
    """ε at δ, by Rényi differential privacy."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise, rate, steps)]
    with _any_order():
        return float(accountant.get_epsilon(delta))


@contextmanager
def _any_order() -> Iterator[None]:
    """Let opacus be silent where another Rényi order might give a lower ε: that of any order is a bound."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        yield


def _mechanism(vit: VisionTransformer, noise: float, clip: float, expected: int, secret: torch.Generator) -> Any:
    """Clipping and noise of opacus for all weights; the optimizer it asks for names them, and never steps."""
    from opacus.optimizers import DPOptimizer

    device = next(vit.parameters()).device
    if device.type != "cpu":  # the noise is drawn where the weights are: by a generator there, of the same secret
        secret = torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, (1,), generator=secret)))
    return DPOptimizer(
        torch.optim.SGD(vit.parameters()),
        noise_multiplier=noise,
        max_grad_norm=clip,
        expected_batch_size=expected,
        generator=secret,
    )


def _sampler(images: int, rate: float, steps: int, secret: torch.Generator) -> Any:
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    return UniformWithReplacementSampler(num_samples=images, sample_rate=rate, generator=secret, steps=steps)


def _give_gradients(vit: VisionTransformer, images: Images, seeds_B: Tensor, config: Config) -> None:
    """Leave with every parameter its gradient for each single image, (B, ...), where opacus looks for it."""
    weights = dict(vit.named_parameters())
    none = {name: weight.new_zeros(0, *weight.shape) for name, weight in weights.items()}
    gradients = _gradients(vit, weights, images, seeds_B, config) if len(images) else none
    for name, weight in weights.items():
        weight.grad_sample = gradients[name].detach()


def _gradients(
    vit: VisionTransformer, weights: dict[str, Tensor], images: Images, seeds_B: Tensor, config: Config
) -> dict[str, Tensor]:
    device = next(iter(weights.values())).device
    pixels = prepare(images.pixels.to(device), config.model)
    if config.local.augment:
        pixels = _augmented(pixels, seeds_B, flip=config.data.flips)

    def loss(weights: dict[str, Tensor], patches_NE: Tensor, label: Tensor) -> Tensor:
        patches = patches_NE[None]
        return label_loss(ask_with(weights, vit, forward_tokens, patches, all_positions(patches)), label[None])

    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernels
        every: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(
            weights, patchify(pixels, config.model.patch_size), images.labels.to(device)
        )
    return every


def _augmented(pixels_BCHW: Tensor, seeds_B: Tensor, *, flip: bool) -> Tensor:
    """Each image by a generator of its own.

    From one for the batch, an image more would move all others, and the sum of gradients by far more than
    `privacy.clip`.
    """
    rng, pairs = torch.Generator(), zip(pixels_BCHW.split(1), seeds_B.tolist(), strict=True)
    return torch.cat([shift_and_flip(image, flip=flip, rng=rng.manual_seed(seed)) for image, seed in pairs])


@torch.no_grad()
def _pull(vit: nn.Module, start: Sequence[Tensor], mu: float) -> None:
    for weight, old in zip(vit.parameters(), start, strict=True):
        assert weight.grad is not None
        weight.grad += mu * (weight - old)
