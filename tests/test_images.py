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


def test_normalisation_by_hand() -> None:
    # Half is taken off the 0..1 scale, and the rest divided by a half: 51 is 0.2, so -0.3, so -0.6.
    assert prepare(torch.tensor([[[[51]]]], dtype=torch.uint8), small(1)).item() == pytest.approx(-0.6, abs=1e-5)
    # ImageNet: (1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225
    colour = torch.tensor([255, 0, 51], dtype=torch.uint8).reshape(1, 3, 1, 1)
    wanted = [2.248908, -2.035714, -0.915556]
    assert prepare(colour, small(1, 3)).flatten().tolist() == pytest.approx(wanted, abs=1e-5)


def test_pixels_are_normalised_as_the_models_weights_were_trained() -> None:
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for name, in_chans, wanted in (
        ("small", 2, ((0.5,) * 2, (0.5,) * 2)),
        ("small", 3, imagenet),
        ("deit_tiny_patch16_224", 3, imagenet),
        ("deit_tiny_patch16_224", 1, ((1.347 / 3,), (0.678 / 3,))),  # the mean over channels, by hand
        ("vit_tiny_patch16_224", 3, ((0.5,) * 3, (0.5,) * 3)),  # augreg
        ("vit_base_patch32_clip_224", 3, clip),
    ):
        found = normalisation(ModelConfig(name=name, in_chans=in_chans))
        torch.testing.assert_close(torch.stack(found), torch.tensor(wanted))


def test_resizing_agrees_with_pillow_and_keeps_a_flat_image_flat() -> None:
    noise = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = Image.fromarray(noise[0, 0].numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    ours = to_uint8(prepare(noise, small(16)), small())[0, 0].int()
    assert (ours - torch.tensor(list(reference.tobytes())).reshape(16, 16)).abs().max() <= 1  # Pillow rounds each pass
    flat = torch.full((2, 3, 20, 12), 77, dtype=torch.uint8)
    assert (to_uint8(prepare(flat, small(8, 3)), small(8, 3)) == 77).all()


def test_subset_follows_the_indices_and_copies(tiny: DataSet) -> None:
    before = tiny.train.pixels.clone()
    picked = tiny.train.subset(torch.tensor([5, 2]))
    assert picked.labels.tolist() == [2, 2]
    assert torch.equal(picked.pixels, before[[5, 2]])
    picked.pixels.zero_()
    assert torch.equal(tiny.train.pixels, before)
    assert len(tiny.train.subset(torch.empty(0, dtype=torch.int64))) == 0
    for pixels, labels in ((before, tiny.train.labels[:1]), (before.float(), tiny.train.labels)):  # do not match
        with pytest.raises(AssertionError):
            Images(pixels, labels)
