"""A ViT on some of its patches: all of them are timm's own forward, absent ones are as if masked out of attention."""

from functools import cache

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import a_vit, settings
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.vit.tokens import (
    all_positions,
    forward_cls,
    forward_tokens,
    patchify,
    put,
    random_flip,
    take,
    unpatchify,
)


def shape(name: str, img_size: int, patch_size: int) -> dict[str, object]:
    return {"model.name": name, "model.img-size": img_size, "model.patch-size": patch_size, "model.in-chans": 3}


MODELS = {
    "small": {},
    "deit": shape("deit_tiny_patch16_224", 32, 8),
    "registers": shape("vit_small_patch14_reg4_dinov2", 28, 14),  # four between [CLS] and patches, without positions
    "deit3": shape("deit3_small_patch16_224", 32, 16),  # no position for [CLS], layer scale
    "clip": shape("vit_xsmall_patch16_clip_224", 32, 8),  # a norm before the blocks
}


@cache
def a_model(name: str) -> tuple[Config, VisionTransformer]:
    """In double precision, so that only an error can make a difference."""
    config = settings(**MODELS[name])
    return config, a_vit(config, seed=5).double()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[Config, VisionTransformer]:
    return a_model(request.param)


def images_for(config: Config) -> Tensor:
    shape = (2, config.model.in_chans, config.model.img_size, config.model.img_size)
    return torch.randn(shape, generator=stream(1), dtype=torch.float64)


def masked_forward(vit: VisionTransformer, images: Tensor, ids_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook dense forward in which absent tokens are masked out of every attention.

    Returns the logits of all tokens and the last attention matrix, mean over heads, with timm's own embedding.
    """
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    prefix = vit.num_prefix_tokens
    present = torch.zeros(x.shape[:2], dtype=torch.bool)
    present[:, :prefix] = True
    present.scatter_(1, ids_BK + prefix, True)
    for block in vit.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        matrix = scores.masked_fill(~present[:, None, None, :], -torch.inf).softmax(-1)
        x = x + block.ls1(attn.proj((matrix @ v).transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = vit.norm(x)
    return vit.head(x[:, 0]), vit.head(x[:, prefix:]), matrix.mean(1)


@torch.no_grad()
def test_all_patches_are_the_vit_itself(model: tuple[Config, VisionTransformer]) -> None:
    config, vit = model
    images = images_for(config)
    patches = patchify(images, config.model.patch_size)
    given = forward_tokens(vit, patches, all_positions(patches))
    wanted = vit(images)
    assert wanted.std() > 0.01  # the images matter
    assert not torch.allclose(wanted[0], wanted[1])
    torch.testing.assert_close(given.cls, wanted)
    tokens = vit.head(vit.forward_features(images)[:, vit.num_prefix_tokens :])
    torch.testing.assert_close(given.patches, tokens)
    assert given.patches.shape == (2, config.model.num_patches, config.model.num_classes)


@torch.no_grad()
def test_some_patches_are_a_dense_forward_with_the_others_masked_out(model: tuple[Config, VisionTransformer]) -> None:
    """In any order: each patch has the place that it is given."""
    config, vit = model
    images = images_for(config)
    ids = torch.rand(2, config.model.num_patches, generator=stream(2)).argsort(1)[:, :3]
    patches = take(patchify(images, config.model.patch_size), ids)
    given = forward_tokens(vit, patches, ids)
    cls, tokens, matrix = masked_forward(vit, images, ids)
    torch.testing.assert_close(given.cls, cls)
    torch.testing.assert_close(given.patches, take(tokens, ids))
    assert not torch.allclose(cls, vit(images), atol=1e-4)
    logits, attention = forward_cls(vit, patches, ids)
    torch.testing.assert_close(logits, cls)
    torch.testing.assert_close(attention, take(matrix[:, 0, vit.num_prefix_tokens :], ids))


@torch.no_grad()
def test_forward_cls_is_timms_own_softmax_matrix(model: tuple[Config, VisionTransformer]) -> None:
    config, vit = model
    images = images_for(config)
    patches = patchify(images, config.model.patch_size)
    logits, attention = forward_cls(vit, patches, all_positions(patches))
    last, seen = vit.blocks[-1].attn, []
    hook = last.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    fused, last.fused_attn = last.fused_attn, False  # without fusion the matrix passes through the dropout
    wanted = vit(images)
    last.fused_attn = fused
    hook.remove()
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(attention, seen[0].mean(1)[:, 0, vit.num_prefix_tokens :])
    assert (attention.sum(1) < 1).all()  # the rest is [CLS] and registers


def test_patchify_reads_row_by_row_and_is_what_the_convolution_sees() -> None:
    images = torch.randn(2, 3, 8, 8, generator=stream(0))
    patches = patchify(images, 4)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(patches[:, 2 * row + column], corner.flatten(1))
    kernel = torch.randn(5, 3, 4, 4, generator=stream(1))
    embedded = F.conv2d(images, kernel, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches @ kernel.flatten(1).T, embedded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "size", "patch"), [(1, 8, 2), (3, 8, 4), (3, 28, 14), (1, 6, 6)])
def test_unpatchify_is_the_inverse(channels: int, size: int, patch: int) -> None:
    images = torch.randn(2, channels, size, size, generator=stream(0))
    patches = patchify(images, patch)
    assert patches.shape == (2, (size // patch) ** 2, channels * patch**2)
    assert torch.equal(unpatchify(patches, patch), images)


def test_take_and_put() -> None:
    values = torch.arange(12.0).reshape(2, 3, 2)
    ids = torch.tensor([[2, 0], [1, 2]])
    assert take(values, ids).tolist() == [[[4, 5], [0, 1]], [[8, 9], [10, 11]]]
    assert take(values[..., 0], ids).tolist() == [[4, 0], [8, 10]]
    before = values.clone()
    changed = put(values, ids, -torch.ones(2, 2, 2))
    assert changed.tolist() == [[[-1, -1], [2, 3], [-1, -1]], [[6, 7], [-1, -1], [-1, -1]]]
    assert torch.equal(values, before)
    assert torch.equal(put(values, ids, take(values, ids)), values)


def test_a_flipped_image_is_torchs_own() -> None:
    images = torch.randn(300, 3, 8, 8, generator=stream(0))
    patches = patchify(images, 2)
    given, positions = random_flip(patches, all_positions(patches), 4, 2, stream(1))
    assert (positions.sort(1).values == torch.arange(16)).all()
    result = unpatchify(put(torch.zeros_like(patches), positions, given), 2)
    kept, mirrored = ((result == each).flatten(1).all(1) for each in (images, images.flip(-1)))
    assert (kept ^ mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_given_patches_move_as_they_do_within_the_whole_image() -> None:
    patches = torch.randn(20, 16, 12, generator=stream(0))
    ids = torch.rand(20, 16, generator=stream(1)).argsort(1)[:, :5]
    whole, places = random_flip(patches, all_positions(patches), 4, 2, stream(2))
    some, there = random_flip(take(patches, ids), ids, 4, 2, stream(2))
    assert torch.equal(some, take(whole, ids))
    assert torch.equal(there, take(places, ids))
