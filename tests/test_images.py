"""Pixels to model input and back: hand-computed normalisation, exact inverse."""

import pytest
import torch
from PIL import Image
from tiny import small

from fedmitr_flwr.config import ModelConfig
from fedmitr_flwr.data.images import DataSet, Images, prepare, to_uint8
from fedmitr_flwr.vit.names import normalisation


@pytest.mark.parametrize("in_chans", [1, 3])
def test_to_uint8_is_the_inverse_of_prepare_and_clamps(in_chans: int) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, in_chans, 1, 1)  # every value
    model = small(16, in_chans)
    assert torch.equal(to_uint8(prepare(pixels, model).requires_grad_(), model), pixels)
    images = torch.tensor([-9.0, 0.0, 9.0]).reshape(1, 1, 1, 3)
    assert to_uint8(images, small()).flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        # Half is taken off the 0..1 scale, and the rest divided by a half: 51 is 0.2, so -0.3, so -0.6.
        ([[51]], [-0.6]),
        # ImageNet: (1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225
        ([[255], [0], [51]], [2.248908, -2.035714, -0.915556]),
    ],
)
def test_normalisation_by_hand(pixels: list[list[int]], expected: list[float]) -> None:
    images = torch.tensor(pixels, dtype=torch.uint8)[None, :, None]
    assert prepare(images, small(1, len(pixels))).flatten().tolist() == pytest.approx(expected, abs=1e-5)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("name", "in_chans", "wanted"),
    [
        ("small", 2, ((0.5,) * 2, (0.5,) * 2)),
        ("small", 3, IMAGENET),
        ("deit_tiny_patch16_224", 3, IMAGENET),
        ("deit_tiny_patch16_224", 1, ((1.347 / 3,), (0.678 / 3,))),  # the mean over channels, by hand
        ("vit_tiny_patch16_224", 3, ((0.5,) * 3, (0.5,) * 3)),  # augreg
        ("vit_base_patch32_clip_224", 3, CLIP),
    ],
)
def test_pixels_are_normalised_as_the_models_weights_were_trained(
    name: str, in_chans: int, wanted: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    mean, std = normalisation(ModelConfig(name=name, in_chans=in_chans))
    torch.testing.assert_close(mean, torch.tensor(wanted[0]))
    torch.testing.assert_close(std, torch.tensor(wanted[1]))


def test_resizing_keeps_a_flat_image_flat_and_is_antialiased() -> None:
    flat = torch.full((2, 3, 20, 12), 77, dtype=torch.uint8)
    assert (to_uint8(prepare(flat, small(8, 3)), small(8, 3)) == 77).all()
    # One white column in four, shrunk to a quarter, is a quarter of white; point samples would miss the columns.
    lines = ((torch.arange(32) % 4 == 0) * 255).to(torch.uint8).expand(1, 1, 32, 32)
    inner = to_uint8(prepare(lines, small()), small())[0, 0, :, 1:-1]
    assert inner.float().sub(255 / 4).abs().max() < 20


def test_resizing_agrees_with_pillow() -> None:
    noise = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = Image.fromarray(noise[0, 0].numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    ours = to_uint8(prepare(noise, small(16)), small())[0, 0].int()
    assert (ours - torch.tensor(list(reference.tobytes())).reshape(16, 16)).abs().max() <= 1  # Pillow rounds each pass


def test_subset_follows_the_indices_and_copies(tiny: DataSet) -> None:
    picked = tiny.train.subset(torch.tensor([5, 2]))
    assert picked.labels.tolist() == [2, 2]
    assert torch.equal(picked.pixels[0], tiny.train.pixels[5])
    before = tiny.train.pixels.clone()
    picked.pixels.zero_()
    assert torch.equal(tiny.train.pixels, before)
    assert len(tiny.train.subset(torch.empty(0, dtype=torch.int64))) == 0


def test_images_refuse_pixels_and_labels_that_do_not_match() -> None:
    with pytest.raises(AssertionError):
        Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(AssertionError):
        Images(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
