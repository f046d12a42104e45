"""A model without a step of training: layer by layer, the clients' average comes to answer as the clients do [M].

What a layer of the average is given, by the averaged layers before it, is not what any client trained it on; such
errors grow with depth. Here the linear layers are solved in their order: by least squares, from what the layers before,
already solved, give on the synthetic images, to the weighted mean of what the clients' own layers say there. The closed
form is that of RegMean (Jin et al. 2023) [C], with the student's inputs in place of the clients', as in ProDistill
(Xu et al. 2025) [C].

Shapes: K clients, B images, Y classes, M patches, T tokens with the prefix, D width, R = B·T rows, I inputs, O outputs.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..ensemble.ensemble import Ensemble
from ..vit.tokens import all_positions, embed, embed_patches, patchify

TOKENS = 10_000  # the layers are solved on as many images as have so many: memory
RIDGE = 0.1  # by which a layer is held where it is
ROWS = 4096  # summed at a time, in float64


@torch.no_grad()
def fit_layers(
    student: VisionTransformer, ensemble: Ensemble, images_BCHW: Tensor, targets_B: Tensor, ridge: float = RIDGE
) -> None:
    """Solve all linear layers of `student`, in place. Norms, prefix tokens and positions stay as they are averaged.

    Args:
        student: the clients' average.
        ensemble: the clients, of the same architecture; each counts on an image by its weight for the image's class.
        images_BCHW: synthetic images.
        targets_B: the classes that they were made for.
        ridge: of the mean square of a layer's inputs: how strongly it is held where it is.
    """
    student.eval()
    most = max(1, TOKENS // (student.num_prefix_tokens + student.patch_embed.num_patches))
    weights_KB11 = ensemble.weights[:, targets_B[:most], None, None]
    patches_BME = patchify(images_BCHW[:most], ensemble.patch)
    positions_BM = all_positions(patches_BME)
    teachers, clients = ensemble.teachers, range(len(ensemble.teachers))

    def mean(said_K: Iterable[Tensor]) -> Tensor:
        total = torch.zeros((), device=weights_KB11.device)
        for weight, said in zip(weights_KB11, said_K, strict=True):
            total = total + weight * said
        return total

    wanted = mean(embed_patches(teachers[k], patches_BME) for k in clients)
    solve(student.patch_embed.proj, patches_BME, wanted, ridge)
    x_BTD = embed(student, patches_BME, positions_BM)
    theirs_KBTD = [embed(teachers[k], patches_BME, positions_BM) for k in clients]
    for depth, block in enumerate(student.blocks):
        layers = _linears(block)
        wanted_L = [torch.zeros((), device=x_BTD.device) for _ in layers]
        for k in clients:
            theirs = teachers[k].blocks[depth]
            with _listening(theirs) as heard:
                theirs_KBTD[k] = theirs(theirs_KBTD[k])
            wanted_L = [total + weights_KB11[k] * said for total, (_, said) in zip(wanted_L, heard, strict=True)]
        for place, layer in enumerate(layers):
            with _listening(block) as heard:
                block(x_BTD)
            solve(layer, heard[place][0], wanted_L[place], ridge)
        x_BTD = block(x_BTD)
    features_B1D = student.forward_head(student.norm(x_BTD), pre_logits=True)[:, None]
    wanted = mean(teachers[k].forward_head(teachers[k].norm(theirs_KBTD[k]))[:, None] for k in clients)
    solve(student.head, features_B1D, wanted, ridge)


def solve(layer: nn.Linear | nn.Conv2d, given_BTI: Tensor, wanted_BTO: Tensor, ridge: float) -> None:
    """Give `layer` the weights W with the least Σ_r |W x_r - y_r|² + ρ |W - W⁰|², W⁰ being those that it has.

    A bias is one more column of W, of an input that is always 1; a convolution is linear in the patches that it is
    `given`. ρ is `ridge` times the mean over the inputs of Σ_r x_ri².
    """
    weight_OI = joined(layer.weight, layer.bias)
    inputs = weight_OI.shape[1]
    gram_II, cross_OI = weight_OI.new_zeros(inputs, inputs), torch.zeros_like(weight_OI)
    rows = given_BTI.flatten(0, 1).split(ROWS), wanted_BTO.flatten(0, 1).split(ROWS)
    for given_RI, wanted_RO in zip(*rows, strict=True):
        x_RI = F.pad(given_RI.double(), (0, inputs - given_RI.shape[1]), value=1.0)
        gram_II += x_RI.T @ x_RI
        cross_OI += wanted_RO.double().T @ x_RI
    solved_OI = least_squares(gram_II, cross_OI, weight_OI, ridge)
    fan_in = given_BTI.shape[2]
    layer.weight.copy_(solved_OI[:, :fan_in].view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(solved_OI[:, fan_in])


def joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(O, I): a linear layer's weights, with its bias as one more column; float64."""
    columns = [weight.flatten(1)] if bias is None else [weight.flatten(1), bias[:, None]]
    return torch.cat(columns, dim=1).double()


def least_squares(gram_II: Tensor, cross_OI: Tensor, start_OI: Tensor, ridge: float) -> Tensor:
    """The W (O, I) with the least Σ |W x - y|² + ρ |W - W⁰|², from Σ x xᵀ, which is changed, Σ y xᵀ and W⁰.

    ρ is `ridge` times the mean of the diagonal of Σ x xᵀ.
    """
    hold = (ridge * gram_II.diagonal().mean()).clamp_min(1e-30)  # there is a solution where nothing was given, too
    gram_II.diagonal().add_(hold)
    solved_OI: Tensor = torch.linalg.solve(gram_II, cross_OI + hold * start_OI, left=False)
    return solved_OI


def _linears(block: Block) -> list[nn.Linear]:
    """In the order in which they are asked."""
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


@contextmanager
def _listening(block: Block) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What its linear layers are given and say when the block is run."""
    heard: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as hooks:
        for layer in _linears(block):
            hook = layer.register_forward_hook(lambda _, given, said: heard.append((given[0], said)))
            hooks.enter_context(hook)
        yield heard
