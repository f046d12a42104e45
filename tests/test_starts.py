"""What inversions start from."""

import pytest
import torch
from tiny import small
from torch import Tensor

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.inversion.starts import MOST_LEAVES, Start, dead_leaves, leaves, noise


@pytest.mark.parametrize("size", [(240, 1, 32, 32), (240, 3, 33, 33)])
def test_an_image_has_no_more_colours_than_leaves_and_their_ground(size: tuple[int, int, int, int]) -> None:
    """Of n leaves on a ground at most n + 1 colours are seen; n is uniform, so images of two colours are not rare."""
    images = dead_leaves(size, stream(2))
    assert images.shape == size
    assert ((images >= 0) & (images <= 1)).all()
    colours = torch.tensor([len(image.flatten(1).unique(dim=1).T) for image in images])
    assert (colours <= 2).sum() >= 5  # a 24th of them have one leaf
    assert 12 < colours.max() <= MOST_LEAVES + 1


def test_every_pixel_is_as_bright_on_average() -> None:
    """Colours are uniform and independent of place: mean 1/2, variance 1/12, at the edge as in the middle."""
    images = dead_leaves((2000, 1, 8, 8), stream(3))
    error = (1 / 12 / 2000) ** 0.5
    assert (images.mean(0) - 0.5).abs().max() < 5 * error
    assert (images.var(0) - 1 / 12).abs().max() < 0.01


def _slope(images_BCHW: Tensor) -> float:
    """Of log power over log frequency: 0 for white noise, about -2 for photographs."""
    side = images_BCHW.shape[-1]
    centred = images_BCHW - images_BCHW.mean((2, 3), keepdim=True)
    power = torch.fft.fft2(centred).abs().square().mean((0, 1))
    frequency = (torch.fft.fftfreq(side)[:, None].square() + torch.fft.fftfreq(side).square()).sqrt()
    used = (frequency > 1.5 / side) & (frequency < 0.25)
    x, y = frequency[used].log(), power[used].log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def test_power_falls_with_frequency_as_in_photographs() -> None:
    """The power of photographs falls with an exponent of 2 and more, that of a single edge with 3."""
    assert -3.1 < _slope(leaves(100, small(64), stream(4))) < -2
    assert _slope(noise(100, small(64), stream(4))) == pytest.approx(0, abs=0.1)


def test_leaves_are_normalised_to_the_range_of_pixels() -> None:
    """Grey pixels are normalised by mean 1/2 and deviation 1/2, colour ones as ImageNet's."""
    grey, red = (leaves(50, small(16, channels), stream(5))[:, 0] for channels in (1, 3))
    torch.testing.assert_close(grey, dead_leaves((50, 1, 16, 16), stream(5))[:, 0] * 2 - 1)
    torch.testing.assert_close(red, (dead_leaves((50, 3, 16, 16), stream(5))[:, 0] - 0.485) / 0.229)


@pytest.mark.parametrize(("start", "channels", "side"), [(noise, 1, 8), (leaves, 3, 33)])
def test_the_same_stream_gives_the_same_images_and_no_two_are_alike(start: Start, channels: int, side: int) -> None:
    images = start(20, small(side, channels), stream(6))
    assert images.shape == (20, channels, side, side)
    assert torch.equal(images, start(20, small(side, channels), stream(6)))
    assert len(images.flatten(1).unique(dim=0)) == 20
    if start is noise:
        torch.testing.assert_close(images, torch.randn(images.shape, generator=stream(6)))
