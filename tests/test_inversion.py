"""Inversion: what is returned is what was optimised, halted pixels rest, the alive set shrinks; starts of images."""

from functools import cache
from itertools import groupby
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import an_ensemble, same, settings, small, some_images
from torch import Tensor

from fedmitr_flwr.common.compute import whole_float32
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion import invert as module
from fedmitr_flwr.inversion import trajectory
from fedmitr_flwr.inversion.invert import Pixels, alive_counts, halting_steps, invert
from fedmitr_flwr.inversion.objective import TINY, AliveVariation, cross_entropy
from fedmitr_flwr.inversion.pool import Pool
from fedmitr_flwr.inversion.starts import MOST_LEAVES, Start, dead_leaves, leaves, noise
from fedmitr_flwr.inversion.trajectory import Trajectory
from fedmitr_flwr.vit.tokens import all_positions, patchify, put, take, unpatchify

SMI = "0.0125,0.025,0.05,0.075"
Halt = tuple[Tensor, Tensor, Tensor, Tensor]
TARGETS = torch.tensor([3, 0, 9])
EVERY = torch.arange(16).expand(3, -1)


def total_variation(images_BCHW: Tensor) -> Tensor:
    """TV₂ of each image (B,) from its definition, for autograd: what `AliveVariation` must agree with."""
    side = images_BCHW.shape[-1]
    norms = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = images_BCHW[..., : side - down, max(0, -right) : side - max(0, right)]
        there = images_BCHW[..., down:, max(0, right) : side + min(0, right)]
        norms.append(((here - there).square().sum((1, 2, 3)) + TINY).sqrt())
    return torch.stack(norms).sum(0)


def still(**changes: object) -> Config:
    return settings(**{f"inversion.{name}": value for name, value in changes.items()})


@cache
def the_ensemble(chans: int = 1) -> Ensemble:
    """Of two teachers; read only."""
    return an_ensemble(settings(**{"model.in-chans": chans}))


def inverted(config: Config, targets: Tensor = TARGETS, lr: float = 0.25, **more: Any) -> Pool:
    """From noise, whose numbers are drawn image by image."""
    more = {"rng": stream(0), "flip": False} | more
    ensemble = the_ensemble(config.model.in_chans)
    return invert(ensemble, targets, config.inversion, config.model, Pixels(noise, lr), **more)


def a_trajectory(start: Tensor, targets: Tensor) -> Trajectory:
    limits = (torch.tensor([-1.0]), torch.tensor([1.0]))
    return Trajectory(the_ensemble(), start, targets, settings().inversion, limits, False, stream(0), 0.25)


@pytest.fixture
def halts(monkeypatch: pytest.MonkeyPatch) -> list[Halt]:
    """Of every call of Trajectory.keep: importance (B, K), positions before (B, K) and after, alive patches before."""
    seen, keep = list[Halt](), Trajectory.keep

    def spy(run: Trajectory, ids: Tensor) -> None:
        importance, before, patches = run.importance(), run.positions_BK.clone(), run.alive_BKE.detach().clone()
        keep(run, ids)
        seen.append((importance, before, run.positions_BK.clone(), patches))

    monkeypatch.setattr(Trajectory, "keep", spy)
    return seen


def test_halting_steps_and_alive_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for steps, stops, wanted in (
        (4000, SMI, [50, 100, 200, 300]),  # as in its paper
        (100, "", []),
        (100, SMI, [1, 2, 5, 8]),  # 1.25, 2.5 (to even), 5, 7.5 (to even)
        (10, SMI, [1, 2, 3, 4]),  # at least one step apart
        (3, SMI, [1, 2]),  # and before the end
        (1, SMI, []),
        (10, "0.3,0.94,0.99", [3, 9]),
    ):
        config = still(steps=steps, stops=stops).inversion
        assert halting_steps(config) == wanted
        assert alive_counts(196, config) == [196, 137, 95, 66, 46][: len(wanted) + 1]  # SMI's
    config = still(steps=10, stops="0.3,0.5").inversion
    assert alive_counts(1, config) == [1, 1, 1]  # never none
    monkeypatch.setattr(module, "DROP", 0.8)
    assert alive_counts(10, config) == [10, 2, 1]  # 10 · (1 - 0.8) is 1.999... in floating point


@given(st.integers(1, 60), st.lists(st.floats(0.01, 0.99), max_size=5, unique=True).map(sorted), st.integers(1, 300))
def test_any_schedule_rises_and_any_count_falls(steps: int, stops: list[float], patches: int) -> None:
    config = still(steps=steps, stops=",".join(map(str, stops))).inversion
    found, counts = halting_steps(config), alive_counts(patches, config)
    assert [0, *found, steps] == sorted({0, *found, steps})
    assert [*counts, 1] == sorted([*counts, 1], reverse=True)


def test_each_stop_keeps_the_most_important_alive_patches_and_halted_ones_never_move_again(halts: list[Halt]) -> None:
    result = inverted(still(), lr=0.5)
    assert [(before.shape[1], after.shape[1]) for _, before, after, _ in halts] == [(16, 11), (11, 7)]
    patches = patchify(result.images, 2)
    for halt in halts:
        for image, (importance, before, after, then) in enumerate(zip(*halt, strict=True)):
            best = before[importance.argsort(descending=True)[: len(after)]]
            assert set(after.tolist()) == set(best.tolist())
            moved = (patches[image, before] != then).any(1)
            assert torch.equal(moved & ~torch.isin(before, after), torch.zeros_like(moved))
            assert moved[result.alive[image, before]].all()
    assert torch.equal(halts[1][1], halts[0][2])
    assert torch.equal(result.alive, torch.zeros(3, 16).bool().scatter(1, halts[1][2], True))
    assert torch.equal(result.dense, result.alive)
    assert torch.equal(result.positions, EVERY)


def test_adam_remembers_the_kept_pixels() -> None:
    """Dropping patches must not disturb the others: Adam's moments go on."""
    run = a_trajectory(some_images(still(), 2), TARGETS[:2])
    for _ in range(3):
        run.step()
    memory = {name: value.clone() for name, value in run.adam.state[run.alive_BKE].items()}
    ids = torch.tensor([[5, 2, 11], [0, 1, 2]])
    run.keep(ids)
    kept = run.adam.state[run.alive_BKE]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(kept[name], take(memory[name], ids))
    run.step()
    assert (kept["step"], memory["step"]) == (4, 3)


def test_dense_calls_as_many_patches_high_as_sparse_keeps() -> None:
    """And without stops they are the same: one that rounds to the end is none."""
    result = inverted(still(mode="dense"))
    assert result.alive.all()
    assert result.dense.sum(1).tolist() == [7, 7, 7]
    patches = patchify(result.images, 2)
    importance = the_ensemble().importance(patches, all_positions(patches), TARGETS)
    for values, high in zip(importance, result.dense, strict=True):
        assert values[high].min() >= values[~high].max()
    dense, sparse = (inverted(still(mode=mode, stops=stops)) for mode, stops in (("dense", ""), ("sparse", "0.999")))
    assert same(dense.tensors(), sparse.tensors())


@pytest.mark.parametrize("mode", ["dense", "sparse", "pri4"])
def test_an_image_does_not_depend_on_its_batch(mode: str) -> None:
    rng = stream(7)
    alone = [inverted(still(mode=mode), TARGETS[i : i + 1], rng=rng) for i in range(3)]
    # 64 normal numbers per image, drawn one after the other: the same in one call as in three.
    together = inverted(still(mode=mode), rng=stream(7))
    images, losses, alive = (
        torch.stack([getattr(each, name) for each in alone], 1).flatten(0, 1) for name in ("images", "loss", "alive")
    )
    torch.testing.assert_close(together.images, images, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.loss, losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(together.alive, alive)


@pytest.mark.parametrize(("mode", "stages"), [("dense", {16: 20}), ("sparse", {16: 5, 11: 5, 7: 10})])
def test_the_best_image_and_loss_are_given(mode: str, stages: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate at which Adam overshoots, so that the last image is not the best."""
    monkeypatch.setattr(trajectory, "TV", 0.01)
    late = 0
    for seed in range(3):
        steps: list[tuple[float, float]] = []
        more = {"rng": stream(seed), "on_step": lambda *step: steps.append(step)}  # noqa: B023
        one = inverted(still(mode=mode, steps=20), TARGETS[:1], lr=0.8, **more)
        losses, shares = map(list, zip(*steps, strict=True))
        assert shares == [alive / 16 for alive, count in stages.items() for _ in range(count)]
        last_stage = losses[-list(stages.values())[-1] :]
        positions = one.alive.nonzero()[:, 1][None]
        scores = the_ensemble().scores(take(patchify(one.images, 2), positions), positions).cls
        again = cross_entropy(scores, one.targets) + 0.01 * total_variation(one.images)
        torch.testing.assert_close(one.loss, again, rtol=1e-4, atol=1e-4)
        assert one.loss.item() == pytest.approx(min(last_stage), rel=1e-6)
        late += min(last_stage) < last_stage[-1] - 1e-3
    assert late, "the last image was always the best: this test sees nothing"


def test_the_loss_falls() -> None:
    """From noise, cut at what a camera can give: the best image of one step is the one before it."""
    seen: list[float] = []
    result = inverted(still(mode="dense", steps=30), on_step=lambda loss, _: seen.append(loss), lr=0.1)
    assert result.loss.mean() < 0.5 * seen[0]
    assert (the_ensemble()(result.images).softmax(1).gather(1, TARGETS[:, None]) > 0.3).all()  # of 10 classes
    start = inverted(still(mode="dense", steps=1, stops="")).images
    assert torch.equal(start, torch.randn(3, 1, 8, 8, generator=stream(0)).clamp(-1, 1))


@pytest.mark.parametrize("mode", ["dense", "sparse", "pri4"])
def test_pixels_stay_what_a_camera_can_give(mode: str) -> None:
    """0 and 1 on ImageNet's scale: (0 - mean) / std and (1 - mean) / std."""
    result = inverted(settings(**{"inversion.mode": mode, "model.in-chans": 3}), lr=5.0)
    low, high = torch.tensor([[-2.1179, -2.0357, -1.8044], [2.2489, 2.4286, 2.6400]])
    per_channel = result.images.transpose(0, 1).flatten(1)
    torch.testing.assert_close(per_channel.amin(1), low, atol=1e-4, rtol=0)
    torch.testing.assert_close(per_channel.amax(1), high, atol=1e-4, rtol=0)


def test_total_variation_of_four_pixels() -> None:
    """Of [[0, 3], [4, 0]]: across (3, 4) -> 5, down (4, 3) -> 5, falling diagonal 0, rising diagonal 1."""
    patches = patchify(torch.tensor([[[[0.0, 3.0], [4.0, 0.0]]]]), 1)
    value, _ = AliveVariation(patches, all_positions(patches), 1)(patches)
    assert value.item() == pytest.approx(11.0, abs=1e-5)
    constant = torch.full((1, 4, 9), 0.5)
    value, gradient = AliveVariation(constant, torch.tensor([[0, 3]]), 3)(constant[:, :2])
    assert value.item() < 0.01
    assert (gradient == 0).all()


@pytest.mark.parametrize(("channels", "size", "patch", "alive"), [(3, 16, 4, 5), (1, 8, 2, 16), (2, 24, 8, 1)])
def test_variation_at_the_cost_of_the_alive_is_the_whole_s(channels: int, size: int, patch: int, alive: int) -> None:
    images = torch.randn(3, channels, size, size, generator=stream(0)).double()
    canvas = patchify(images, patch)
    positions = torch.rand(canvas.shape[:2], generator=stream(1)).argsort(1)[:, :alive]
    variation = AliveVariation(canvas, positions, patch)
    for seed in (2, 3):  # asked again after the pixels moved: nothing of the first call is left
        patches = torch.randn(3, alive, canvas.shape[2], generator=stream(seed)).double().requires_grad_()
        wanted = total_variation(unpatchify(put(canvas, positions, patches), patch))
        (slope,) = torch.autograd.grad(wanted.sum(), patches)
        found, gradient = variation(patches)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize(("rebirths", "share"), [(4, 4), (3, 5), (1, 16)])
def test_rebirths_share_their_trajectory_s_patches(rebirths: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REBIRTHS", rebirths)
    result = inverted(still(mode="pri4"))
    assert result.targets.tolist() == TARGETS.tolist() * rebirths
    assert result.positions.shape == result.dense.shape == (3 * rebirths, share)
    assert torch.isfinite(result.loss).all()
    for image in range(3):
        parts = result.positions[image::3]  # the rebirths of one trajectory
        assert len(set(parts.flatten().tolist())) == rebirths * share
        for part, alive in zip(parts, result.alive[image::3], strict=True):
            assert alive.nonzero().flatten().tolist() == part.sort().values.tolist()
    wanted = [True] * (3 * ((rebirths + 1) // 2)) + [False] * (3 * (rebirths // 2))  # the earlier half is high
    assert result.dense.all(1).tolist() == result.dense.any(1).tolist() == wanted


def test_a_rebirth_takes_the_most_important_that_rest_then(halts: list[Halt], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REBIRTHS", 3)
    shares: list[float] = []
    result = inverted(still(mode="pri4"), on_step=lambda _loss, alive: shares.append(alive))
    assert shares == [1.0] * 2 + [11 / 16] * 3 + [6 / 16] * 3  # 8 steps in 3 rebirths: after 2, 5 and 8
    # 3 of 5 patches; one is left over
    assert [(before.shape[1], after.shape[1]) for _, before, after, _ in halts] == [(16, 11), (11, 6), (6, 1)]
    patches = patchify(result.images, 2)
    for rebirth, (importance, before, _, then) in enumerate(halts):
        rows, best = slice(3 * rebirth, 3 * rebirth + 3), importance.argsort(1, descending=True)[:, :5]
        assert torch.equal(result.positions[rows], take(before, best))
        assert torch.equal(take(patches[rows], take(before, best)), take(then, best))


def test_a_finished_rebirth_looks_as_it_was_optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of v = 1 rebirths is a dense run of as many steps: its pixels are those after the last step."""
    monkeypatch.setattr(module, "REBIRTHS", 1)
    reborn = inverted(still(mode="pri4"))
    run = a_trajectory(torch.randn(3, 1, 8, 8, generator=stream(0)), TARGETS)
    for _ in range(8):
        run.step()
    assert torch.equal(patchify(reborn.images, 2), run.alive_BKE)


def test_flips_reach_the_teachers() -> None:
    with patch.object(Ensemble, "slope", autospec=True, side_effect=Ensemble.slope) as spy:
        for flip, seen in ((False, {(0, 1, 2, 3)}), (True, {(0, 1, 2, 3), (3, 2, 1, 0)})):
            result = inverted(still(mode="dense"), flip=flip)
            assert {tuple(row[:4].tolist()) for call in spy.call_args_list for row in call.args[3]} == seen
    assert torch.equal(result.positions, EVERY)  # the image's own patches stay where they are


@pytest.mark.parametrize("mode", ["sparse", "pri4"])
def test_large_batches_are_halved(mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    targets, step, sizes = torch.arange(5), Trajectory.step, list[int]()
    whole = inverted(still(mode=mode), targets)

    def small_memory(run: Trajectory) -> object:
        sizes.append(len(run.targets_B))
        if len(run.targets_B) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(run)

    monkeypatch.setattr(Trajectory, "step", small_memory)
    parts = inverted(still(mode=mode), targets)
    assert "out of memory with 5 images at once" in caplog.messages[0]
    assert [size for size, _ in groupby(sizes)] == [5, 2, 3, 1, 2]
    # The same images; those of `pri4` come half by half.
    order = parts.targets.argsort(stable=True), whole.targets.argsort(stable=True)
    torch.testing.assert_close(parts.images[order[0]], whole.images[order[1]], rtol=1e-3, atol=1e-3)
    assert torch.equal(parts.alive[order[0]], whole.alive[order[1]])


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trajectory, "step", broken := Mock(side_effect=RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        inverted(still())
    assert broken.call_count == 1
    monkeypatch.setattr(Trajectory, "step", lambda _run: torch.empty(2**62))
    with pytest.raises(RuntimeError, match=r"allocate|size"):
        inverted(still(), TARGETS[:1])  # one image cannot be halved


@pytest.mark.parametrize("allowed", [True, False])
def test_a_gpu_rounds_neither_products_nor_convolutions(allowed: bool) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        products.allow_tf32 = convolutions.allow_tf32 = allowed
        with whole_float32():
            assert (products.allow_tf32, convolutions.allow_tf32) == (False, False)
        assert (products.allow_tf32, convolutions.allow_tf32) == (allowed, allowed)
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


# --- what images start from


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
