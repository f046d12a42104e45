"""Private training: plain SGD without noise, images clipped by hand, what is spent by formula, a secret that is one."""

import importlib.util
import json
import math
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from local_grid import TINY, Federate, LocalGrid, complaint
from timm.models.vision_transformer import VisionTransformer
from tiny import CPU, a_vit, same, settings, small

from client_app.app import app as client_app
from fedmitr_flwr import pipeline
from fedmitr_flwr.client import private
from fedmitr_flwr.client.losses import label_loss
from fedmitr_flwr.client.private import epsilon_of, noise_for, require_opacus, train_privately
from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.errors import ConfigError, RunError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import DataSet, Images, prepare
from fedmitr_flwr.vit.build import initial_weights
from fedmitr_flwr.vit.tokens import all_positions, forward_tokens, patchify
from server_app.records import order

pytest.importorskip("opacus", reason="an optional library")
pytestmark = pytest.mark.usefixtures("plain_steps")
ALONE: dict[str, object] = {"local.outliers": 0.0}  # what privacy.epsilon asks for


def whispering(**changes: Any) -> Config:
    """One full batch at once, plain SGD without momentum's help: one step of learning rate 1."""
    plain = {"local.optimizer": "sgd", "local.lr": 1.0, "local.augment": False, "local.batch-size": 60}
    tiny = {"model.num-classes": 3, "model.depth": 1}
    return settings(**{"privacy.epsilon": 5.0, "privacy.clip": 1e6} | plain | tiny | changes)


def steps_of(vit: VisionTransformer, config: Config) -> list[torch.Tensor]:
    """How far each weight moved."""
    pairs = zip(vit.parameters(), a_vit(config, 1).parameters(), strict=True)
    return [new.detach() - old.detach() for new, old in pairs]


def trained(config: Config, images: Images, secret_seed: int = 0, mu: float = 0.0) -> tuple[list[torch.Tensor], float]:
    """`steps_of` private training, and what was spent."""
    vit = a_vit(config, 1)
    spent = train_privately(vit, images, config, stream(secret_seed, "secret"), CPU, mu)
    return steps_of(vit, config), spent


def gradients(config: Config, images: Images) -> list[list[torch.Tensor]]:
    """Of each image by itself, by plain autograd."""
    vit, every = a_vit(config, 1), []
    for row in range(len(images)):
        one = images.subset(torch.tensor([row]))
        patches = patchify(prepare(one.pixels, small()), 2)
        loss = label_loss(forward_tokens(vit, patches, all_positions(patches)), one.labels)
        every.append(list(torch.autograd.grad(loss, list(vit.parameters()))))
    return every


def length(gradient: list[torch.Tensor]) -> float:
    return math.sqrt(sum(part.square().sum().item() for part in gradient))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise."""
    monkeypatch.setattr(private, "noise_for", lambda *_: 0.0)
    monkeypatch.setattr(private, "epsilon_of", lambda *_: math.inf)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("clip", [1e6, 0.5])
def test_without_noise_a_step_is_sgds_with_every_image_clipped_by_itself(
    tiny: DataSet, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are taken in two parts."""
    monkeypatch.setattr(private, "TOGETHER", 7)
    config = whispering(**{"privacy.clip": clip, "local.batch-size": 12})
    images = tiny.train.subset(torch.arange(12))
    moved, _ = trained(config, images)
    every = gradients(config, images)
    assert min(map(length, every)) > 0.5  # all are cut, or none
    for number, step in enumerate(moved):
        cut = [gradient[number] * min(1, clip / length(gradient)) for gradient in every]
        torch.testing.assert_close(step, -torch.stack(cut).mean(0), atol=1e-5, rtol=1e-3)
    assert length(moved) <= clip + 1e-5


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_without_noise_and_clipping_it_is_ordinary_training(tiny: DataSet, optimizer: str) -> None:
    """Four steps of full batches; only the order in which gradients are summed differs."""
    config = whispering(**{"local.optimizer": optimizer, "local.lr": 0.01, "local.epochs": 4})
    moved, _ = trained(config, tiny.train)
    vit = a_vit(config, 1)
    train_local(vit, tiny.train, config, stream(0, "r"), CPU)
    plain = steps_of(vit, config)
    assert length([ours - theirs for ours, theirs in zip(moved, plain, strict=True)]) < 0.1 * length(plain)  # bfloat16


@pytest.mark.usefixtures("silent")
def test_an_image_more_moves_the_sum_by_no_more_than_the_clip(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others keep their shifts. All gradients are longer than the clip, so it is its length to the digit."""
    config = whispering(**{"privacy.clip": 0.1, "local.augment": True, "data.flip": True})

    def summed(left_out: int | None = None, config: Config = config) -> list[torch.Tensor]:
        monkeypatch.setattr(private, "_sampler", lambda *_: [[row for row in range(60) if row != left_out]])
        return [60 * step for step in trained(config, tiny.train)[0]]

    def apart(other: list[torch.Tensor]) -> float:
        return length([one - two for one, two in zip(whole, other, strict=True)])

    whole = summed()
    assert [apart(summed(row)) for row in (0, 29, 59)] == pytest.approx([0.1] * 3, rel=1e-3)
    still = whispering(**{"privacy.clip": 0.1})
    assert apart(summed(config=still)) > 0.2  # it is the shifts that are put to the test


def test_shifts_are_of_all_kinds_and_new_in_every_step(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    patchify = private.patchify
    monkeypatch.setattr(private, "patchify", lambda pixels, size: (seen.append(pixels), patchify(pixels, size))[1])
    monkeypatch.setattr(private, "_sampler", lambda *_: [list(range(60))] * 12)
    alike = tiny.train.subset(torch.zeros(60, dtype=torch.long))
    pixels = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(60, 1, 8, 8)
    trained(whispering(**{"local.augment": True, "data.flip": True}), Images(pixels, alike.labels))
    kinds, counts = torch.cat(seen).flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 18  # three rows, three columns, two sides
    assert counts.sum() == 720
    assert 15 <= counts.min() <= counts.max() <= 70  # 40 ± 6.1 each
    steps = [torch.cat(seen[step : step + 2]) for step in range(0, 24, 2)]  # in parts of 32
    assert not any(torch.equal(steps[0], later) for later in steps[1:])


def test_nothing_is_drawn_from_what_the_server_knows(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other seeds, rounds and clients give the same bits, if only the secret is the same."""
    flat = {"privacy.epsilon": 20.0, "model.depth": 1, "model.num-classes": 3, "local.batch-size": 60}
    start = initial_weights(settings(**flat).model, 0)
    monkeypatch.setattr(pipeline, "stream", lambda *_: pytest.fail("a public stream"))
    monkeypatch.setattr(pipeline, "client_images", lambda *_: (tiny.train, tiny.train.subset(torch.arange(0))))
    others = [pipeline.train_client(settings(**flat), 0, start) for _ in range(2)]
    assert not torch.equal(*(other.weights["head.weight"] for other in others))
    assert others[0].epsilon == others[1].epsilon
    assert others[0].train_loss == 0.0  # it would tell of the images
    monkeypatch.setattr(pipeline, "secret", lambda: stream(5, "secret"))
    torch.manual_seed(1)
    one = pipeline.train_client(settings(**flat, seed=1), 0, start, server_round=1)
    torch.manual_seed(2)
    two = pipeline.train_client(settings(**flat, seed=2), 1, start, server_round=2)
    assert same(one.weights, two.weights)
    assert not torch.equal(one.weights["head.weight"], start["head.weight"])


def rdp_epsilon(noise: float, steps: int, delta: float) -> float:
    """Of the Gaussian mechanism without sampling (Mironov 2017; conversion by Balle et al. 2020), on a grid of α."""
    alphas = np.linspace(1.01, 200, 200_000)
    rdp = steps * alphas / (2 * noise**2)
    return float((rdp + np.log((alphas - 1) / alphas) - (np.log(delta) + np.log(alphas)) / (alphas - 1)).min())


def test_the_noise_is_as_large_as_the_accountant_was_told(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each weight: clip · multiplier / images, in one step of full batches; nearly 2,000 weights say how much.

    What is spent is by formula, and no more than was allowed.
    """
    for noise, steps, delta in ((4.0, 10, 1e-5), (10.0, 100, 1e-6)):
        assert epsilon_of(noise, 1.0, steps, delta) == pytest.approx(rdp_epsilon(noise, steps, delta), rel=0.02)
        assert epsilon_of(noise, 0.1, steps, delta) < epsilon_of(noise, 1.0, steps, delta)  # hidden among others
    config = whispering(**{"privacy.epsilon": 2.0})
    noise = noise_for(config, 0.25, 40)
    assert 1.94 <= epsilon_of(noise, 0.25, 40, 1e-5) <= 2.0
    assert noise_for(config, 0.25, 80) > noise
    with pytest.raises(ConfigError, match=rf"promises nothing to one of {len(tiny.train)} images; use less than 1 / "):
        trained(whispering(**{"privacy.delta": 0.1}), tiny.train)
    monkeypatch.setattr(private, "noise_for", lambda *_: 3.0)
    clipped = whispering(**{"privacy.clip": 1e-6})  # the images themselves hardly count
    flat = torch.cat([step.flatten() for step in trained(clipped, tiny.train)[0]]).double()
    expected = 1e-6 * 3.0 / 60
    assert flat.std().item() == pytest.approx(expected, rel=0.1)
    assert abs(flat.mean().item()) < 5 * expected / math.sqrt(len(flat))


@pytest.mark.usefixtures("silent")
def test_an_empty_draw_and_the_pull_to_the_start(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is drawn, and nothing is heard: the weights stay, but for what pulls them."""
    monkeypatch.setattr(private, "_sampler", lambda *_: [[]])
    assert length(trained(whispering(), tiny.train)[0]) == 0
    config = whispering(**{"local.epochs": 2})
    monkeypatch.setattr(private, "_sampler", lambda *_: [list(range(60)), []])
    # One step of g; then, at half the rate, momentum 0.9 g once more, and back by 0.1 of the way.
    for step, unpulled in zip(*(trained(config, tiny.train, mu=mu)[0] for mu in (0.1, 0.0)), strict=True):
        torch.testing.assert_close(step, unpulled - 0.5 * 0.1 * unpulled / 1.45, atol=1e-6, rtol=1e-3)


def test_what_would_tell_beside_the_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is a missing library."""
    tells = "reveals something of the images without noise"
    for changes, message in (
        ({"upload.extras": "counts"}, f'upload.extras = "counts" {tells}'),
        ({"local.outliers": 0.5}, f"local.outliers = 0.5 {tells}"),
        ({"flower.rounds": 2, "flower.strategy": "fedavg"}, "would spend it in each; set flower.rounds = 1"),
    ):
        Config.from_flat(changes)
        with pytest.raises(ConfigError, match=message):
            Config.from_flat({"privacy.epsilon": 3.0} | ALONE | changes)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    require_opacus(Config())
    with pytest.raises(ConfigError, match=r"privacy.epsilon = 3.0 needs opacus at every client; run there: pip inst"):
        require_opacus(Config.from_flat({"privacy.epsilon": 3.0} | ALONE))


def replies(node: dict[str, Any], **asked: Any) -> list[Message]:
    """Of a node that was started with these keys, to all that the server may ask."""
    grid = LocalGrid(client_app, 2)
    grid.contexts[grid.node(0)].node_config |= node
    own = {"evaluate.where": "clients", "evaluate.holdout": 0.2, "partition.clients": 2, "local.batch-size": 75}
    config = Config.from_flat(TINY | ALONE | own | asked)
    content = RecordDict({"arrays": ArrayRecord(initial_weights(config.model, 0)), "config": order(config)})
    kinds = ("query.describe", "train", "evaluate")
    return [reply for kind in kinds for reply in grid.send_and_receive([Message(content.copy(), grid.node(0), kind)])]


def test_a_node_may_want_more_privacy_than_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    too_much = "this node wants privacy.epsilon of at most 2, and the server's is {} (0: none)"
    too_likely = "this node wants privacy.delta of at most {}, and the server's is {}; lower it there, or raise"
    cases: list[tuple[dict[str, Any], float, float, str]] = [
        ({"max-epsilon": 2.0}, 8.0, 1e-5, too_much.format(8)),
        ({"max-epsilon": 2}, 0.0, 1e-5, too_much.format(0)),
        ({"max-epsilon": 8}, 8.0, 1e-5, ""),
        ({"max-epsilon": 8}, 8.0, 2e-5, too_likely.format("1e-05", "2e-05")),
        ({"max-epsilon": 8, "max-delta": 1e-3}, 8.0, 1e-3, ""),
        ({"max-epsilon": 8, "max-delta": 1e-7}, 8.0, 1e-5, too_likely.format("1e-07", "1e-05")),
        ({}, 0.0, 1e-3, ""),
    ]
    for number, (node, epsilon, delta, refused) in enumerate(cases):
        monkeypatch.setenv("FLWR_HOME", str(tmp_path / str(number)))
        told = [complaint(each) for each in replies(node, **{"privacy.epsilon": epsilon, "privacy.delta": delta})]
        assert len(told) == 3
        assert all(each.startswith(refused) and bool(each) == bool(refused) for each in told), node
        assert (tmp_path / f"{number}/fedmitr/privacy.jsonl").exists() == (bool(epsilon) and not refused)


def test_a_node_s_limit_bounds_all_runs_together(tmp_path: Path) -> None:
    node = {"max-epsilon": 7, "work-path": str(tmp_path / "work")}
    refused = "this node's max-epsilon = 7 bounds all uploads of its images together: "
    for seed in range(3):
        described, trained, _ = replies(node, **{"privacy.epsilon": 3.0, "seed": seed})
        assert complaint(described).startswith(refused) == trained.has_error() == (seed == 2)
    lines = (tmp_path / "work/privacy.jsonl").read_text().splitlines()
    assert [2.7 < json.loads(line)["epsilon"] <= 3.0 for line in lines] == [True, True]
    assert stat.S_IMODE((tmp_path / "work/privacy.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "work").stat().st_mode) == 0o700


def test_what_was_spent_is_in_the_run(federate: Federate) -> None:
    fast = {"local.batch-size": 50, "ensemble.weights": "size", "screen.mode": "off"}
    run = federate(LocalGrid(client_app, 3), **ALONE | fast | {"privacy.epsilon": 8.0})
    spent = run.read_result()["epsilon"]
    assert all(7.5 < each <= 8.0 for each in spent)
    assert [upload.epsilon for upload in run.load_uploads()] == spent
    with pytest.raises(RunError, match=r"privacy\.epsilon"):
        pipeline.fuse(run, "fedavg", {"privacy.epsilon": 0.0})
