"""A ViT on some of its patches: all of them are timm's own forward, absent ones are as if masked out of attention."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import a_vit, settings, some_images
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

Model = tuple[Config, VisionTransformer, Tensor]
MODELS = {  # sides of an image and of a patch, channels
    "small": (8, 2, 1),
    "deit_tiny_patch16_224": (32, 8, 3),
    "vit_small_patch14_reg4_dinov2": (28, 14, 3),  # four registers between [CLS] and patches, without positions
    "deit3_small_patch16_224": (32, 16, 3),  # no position for [CLS], layer scale
    "vit_xsmall_patch16_clip_224": (32, 8, 3),  # a norm before the blocks
}


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """With two images, all in double precision, so that only an error can make a difference."""
    sizes = dict(zip(("model.img-size", "model.patch-size", "model.in-chans"), MODELS[request.param], strict=True))
    config = settings(**sizes, **{"model.name": request.param})
    return config, a_vit(config, seed=5).double(), some_images(config, 2).double()


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
def test_all_patches_are_the_vit_itself(model: Model) -> None:
    config, vit, images = model
    patches = patchify(images, config.model.patch_size)
    given, wanted = forward_tokens(vit, patches, all_positions(patches)), vit(images)
    assert wanted.std() > 0.01  # the images matter
    assert not torch.allclose(wanted[0], wanted[1])
    torch.testing.assert_close(given.cls, wanted)
    torch.testing.assert_close(given.patches, vit.head(vit.forward_features(images)[:, vit.num_prefix_tokens :]))


@torch.no_grad()
def test_some_patches_are_a_dense_forward_with_the_others_masked_out(model: Model) -> None:
    """In any order: each patch has the place that it is given."""
    config, vit, images = model
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
def test_forward_cls_is_timms_own_softmax_matrix(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    config, vit, images = model
    patches = patchify(images, config.model.patch_size)
    logits, attention = forward_cls(vit, patches, all_positions(patches))
    last, seen = vit.blocks[-1].attn, []
    monkeypatch.setattr(last, "fused_attn", False)  # without fusion the matrix passes through the dropout
    hook = last.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    torch.testing.assert_close(logits, vit(images))
    hook.remove()
    torch.testing.assert_close(attention, seen[0].mean(1)[:, 0, vit.num_prefix_tokens :])
    assert (attention.sum(1) < 1).all()  # the rest is [CLS] and registers


def test_patchify_reads_row_by_row_and_is_what_the_convolution_sees() -> None:
    images = torch.randn(2, 3, 8, 8, generator=stream(0))
    patches = patchify(images, 4)
    assert torch.equal(patches[:, 1], images[:, :, :4, 4:].flatten(1))
    kernel = torch.randn(5, 3, 4, 4, generator=stream(1))
    embedded = F.conv2d(images, kernel, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches @ kernel.flatten(1).T, embedded, rtol=1e-4, atol=1e-4)
    for patch in (1, 2, 4, 8):
        assert torch.equal(unpatchify(patchify(images, patch), patch), images)


def test_take_and_put() -> None:
    values, ids = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[2, 0], [1, 2]])
    assert take(values, ids).tolist() == [[[4, 5], [0, 1]], [[8, 9], [10, 11]]]
    assert take(values[..., 0], ids).tolist() == [[4, 0], [8, 10]]
    changed = put(values, ids, -torch.ones(2, 2, 2))
    assert changed.tolist() == [[[-1, -1], [2, 3], [-1, -1]], [[6, 7], [-1, -1], [-1, -1]]]
    assert torch.equal(values, torch.arange(12.0).reshape(2, 3, 2))


def test_a_flipped_image_is_torchs_own() -> None:
    """And given patches move as they do within the whole image."""
    images = torch.randn(300, 3, 8, 8, generator=stream(0))
    patches = patchify(images, 2)
    given, positions = random_flip(patches, all_positions(patches), 4, 2, stream(1))
    assert (positions.sort(1).values == torch.arange(16)).all()
    result = unpatchify(put(torch.zeros_like(patches), positions, given), 2)
    kept, mirrored = ((result == each).flatten(1).all(1) for each in (images, images.flip(-1)))
    assert (kept ^ mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.1)
    ids = torch.rand(300, 16, generator=stream(2)).argsort(1)[:, :5]
    some, there = random_flip(take(patches, ids), ids, 4, 2, stream(1))
    assert torch.equal(some, take(given, ids))
    assert torch.equal(there, take(positions, ids))
