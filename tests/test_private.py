"""Private training: plain SGD without noise, images clipped by hand, what is spent by formula, a secret that is one."""

import importlib.util
import json
import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from local_grid import TINY, LocalGrid, server_context
from tiny import a_vit, same, settings, small

from client_app.app import app as client_app
from fedmitr_flwr import pipeline
from fedmitr_flwr.client import private
from fedmitr_flwr.client.losses import label_loss
from fedmitr_flwr.client.private import epsilon_of, noise_for, require_opacus, train_privately
from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.errors import ConfigError, RunError
from fedmitr_flwr.common.rng import secret, stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import DataSet, Images, prepare
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.vit import optim
from fedmitr_flwr.vit.build import initial_weights
from fedmitr_flwr.vit.tokens import all_positions, forward_tokens, patchify
from server_app.app import app as server_app
from server_app.records import order

CPU = torch.device("cpu")
ALONE: dict[str, object] = {"local.outliers": 0.0}  # what privacy.epsilon asks for
needs_opacus = pytest.mark.skipif(
    importlib.util.find_spec("opacus") is None, reason="needs opacus, an optional library"
)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps by the gradients alone."""
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.0)
    monkeypatch.setattr(optim, "GRAD_CLIP", math.inf)


def whispering(**changes: Any) -> Config:
    """One full batch at once, plain SGD without momentum's help: one step of learning rate 1."""
    base = {
        "privacy.epsilon": 5.0,
        "privacy.clip": 1e6,
        "local.optimizer": "sgd",
        "local.lr": 1.0,
        "local.augment": False,
        "local.batch-size": 60,
        "model.num-classes": 3,
        "model.depth": 1,
    }
    return settings(**base | changes)


def trained(config: Config, images: Images, secret_seed: int = 0, mu: float = 0.0) -> tuple[list[torch.Tensor], float]:
    """How far each weight moved, and what was spent."""
    vit = a_vit(config, 1)
    before = [weight.detach().clone() for weight in vit.parameters()]
    spent = train_privately(vit, images, config, stream(secret_seed, "secret"), CPU, mu)
    return [new.detach() - old for new, old in zip(vit.parameters(), before, strict=True)], spent


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


@needs_opacus
def test_a_delta_that_promises_nothing_is_refused_before_training(tiny: DataSet) -> None:
    config = replace(whispering(), privacy=replace(whispering().privacy, delta=0.1))
    with pytest.raises(ConfigError, match=rf"promises nothing to one of {len(tiny.train)} images; use less than 1 / "):
        trained(config, tiny.train)


@needs_opacus
@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("together", [7, 32])
def test_without_noise_and_clipping_a_step_is_plain_sgds(
    tiny: DataSet, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "TOGETHER", together)
    config = whispering()
    moved, _ = trained(config, tiny.train)
    every = gradients(config, tiny.train)
    for number, step in enumerate(moved):
        mean = torch.stack([gradient[number] for gradient in every]).mean(0)
        torch.testing.assert_close(step, -mean, atol=1e-5, rtol=1e-3)


@needs_opacus
@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_without_noise_and_clipping_it_is_ordinary_training(tiny: DataSet, optimizer: str) -> None:
    """Four steps of full batches; only the order in which gradients are summed differs."""
    config = whispering(**{"local.optimizer": optimizer, "local.lr": 0.01, "local.epochs": 4})
    moved, _ = trained(config, tiny.train)
    vit = a_vit(config, 1)
    before = [weight.detach().clone() for weight in vit.parameters()]
    train_local(vit, tiny.train, config, stream(0, "r"), CPU)
    plain = torch.cat([(new - old).flatten() for new, old in zip(vit.parameters(), before, strict=True)])
    private_ones = torch.cat([step.flatten() for step in moved])
    assert (private_ones - plain).norm() < 0.1 * plain.norm()  # Muon rounds to bfloat16


@needs_opacus
@pytest.mark.usefixtures("silent")
def test_every_image_is_clipped_by_itself(tiny: DataSet) -> None:
    config, images = whispering(**{"privacy.clip": 0.5, "local.batch-size": 6}), tiny.train.subset(torch.arange(6))
    moved, _ = trained(config, images)
    every = gradients(config, images)
    assert min(map(length, every)) > 0.5  # all are cut
    for number, step in enumerate(moved):
        cut = [gradient[number] * 0.5 / length(gradient) for gradient in every]
        torch.testing.assert_close(step, -torch.stack(cut).mean(0), atol=1e-5, rtol=1e-3)
    assert length(moved) <= 0.5 + 1e-5


@needs_opacus
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


@needs_opacus
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


@needs_opacus
def test_nothing_is_drawn_from_what_the_server_knows(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other seeds, rounds and clients give the same bits, if only the secret is the same."""
    monkeypatch.setattr(pipeline, "secret", lambda: stream(5, "secret"))
    monkeypatch.setattr(pipeline, "stream", lambda *_: pytest.fail("a public stream"))
    monkeypatch.setattr(pipeline, "client_images", lambda *_: (tiny.train, tiny.train.subset(torch.arange(0))))
    flat = {"privacy.epsilon": 20.0, "model.depth": 1, "model.num-classes": 3, "local.augment": True}
    start = initial_weights(settings(**flat).model, 0)
    torch.manual_seed(1)
    one = pipeline.train_client(settings(**flat, seed=1), 0, start, server_round=1)
    torch.manual_seed(2)
    two = pipeline.train_client(settings(**flat, seed=2), 1, start, server_round=2)
    assert same(one.weights, two.weights)
    assert not torch.equal(one.weights["head.weight"], start["head.weight"])


@needs_opacus
def test_the_noise_is_as_large_as_the_accountant_was_told(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each weight: clip · multiplier / images, in one step of full batches; nearly 2,000 weights say how much."""
    monkeypatch.setattr(private, "noise_for", lambda *_: 3.0)
    config = whispering(**{"privacy.clip": 1e-6})  # the images themselves hardly count
    moved, _ = trained(config, tiny.train)
    flat = torch.cat([step.flatten() for step in moved]).double()
    expected = 1e-6 * 3.0 / 60
    assert flat.std().item() == pytest.approx(expected, rel=0.1)
    assert abs(flat.mean().item()) < 5 * expected / math.sqrt(len(flat))


def rdp_epsilon(noise: float, steps: int, delta: float) -> float:
    """Of the Gaussian mechanism without sampling (Mironov 2017; conversion by Balle et al. 2020), on a grid of α."""
    alphas = np.linspace(1.01, 200, 200_000)
    rdp = steps * alphas / (2 * noise**2)
    return float((rdp + np.log((alphas - 1) / alphas) - (np.log(delta) + np.log(alphas)) / (alphas - 1)).min())


@needs_opacus
@pytest.mark.parametrize(("noise", "steps", "delta"), [(4.0, 10, 1e-5), (10.0, 100, 1e-6)])
def test_what_is_spent_by_formula(noise: float, steps: int, delta: float) -> None:
    assert epsilon_of(noise, 1.0, steps, delta) == pytest.approx(rdp_epsilon(noise, steps, delta), rel=0.02)
    assert epsilon_of(noise, 0.1, steps, delta) < epsilon_of(noise, 1.0, steps, delta)  # hidden among others


@needs_opacus
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_no_more_is_spent_than_was_allowed(epsilon: float) -> None:
    config = whispering(**{"privacy.epsilon": epsilon})
    noise = noise_for(config, 0.25, 40)
    assert 0.97 * epsilon <= epsilon_of(noise, 0.25, 40, 1e-5) <= epsilon
    assert noise_for(config, 0.25, 80) > noise


@needs_opacus
def test_the_public_seed_does_not_give_the_noise_away(tiny: DataSet) -> None:
    config = whispering(**{"local.epochs": 2, "local.batch-size": 20})
    (first, spent), (again, _), (other, _) = (trained(config, tiny.train, seed) for seed in (1, 1, 2))
    assert 0 < spent <= 5.0
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # by the secret alone
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(torch.rand(8, generator=secret()), torch.rand(8, generator=secret()))
    small = settings(**{"privacy.epsilon": 20.0, "model.depth": 1})
    start = initial_weights(small.model, 0)
    one, two = (pipeline.train_client(small, 0, start) for _ in range(2))
    assert not torch.equal(one.weights["head.weight"], two.weights["head.weight"])
    assert one.epsilon == two.epsilon
    assert one.train_loss == 0.0  # it would tell of the images


@needs_opacus
@pytest.mark.usefixtures("silent")
def test_an_empty_draw_and_the_pull_to_the_start(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is drawn, and nothing is heard: the weights stay, but for what pulls them."""
    monkeypatch.setattr(private, "_sampler", lambda *_: [[]])
    still, _ = trained(whispering(), tiny.train)
    assert length(still) == 0
    config = whispering(**{"local.epochs": 2})
    monkeypatch.setattr(private, "_sampler", lambda *_: [list(range(60)), []])
    pulled, _ = trained(config, tiny.train, mu=0.1)
    free, _ = trained(config, tiny.train)
    # One step of g; then, at half the rate, momentum 0.9 g once more, and back by 0.1 of the way.
    for step, unpulled in zip(pulled, free, strict=True):
        torch.testing.assert_close(step, unpulled - 0.5 * 0.1 * unpulled / 1.45, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upload.extras": "counts"}, 'upload.extras = "counts" reveals something of the images without noise'),
        ({"upload.extras": "moments"}, 'upload.extras = "moments" reveals something of the images without noise'),
        ({"local.prior-adjust": 0.5}, "local.prior-adjust = 0.5 reveals something of the images without noise"),
        ({"local.outliers": 0.5}, "local.outliers = 0.5 reveals something of the images without noise"),
        ({"flower.rounds": 2, "flower.strategy": "fedavg"}, "would spend it in each; set flower.rounds = 1"),
    ],
)
def test_what_would_tell_beside_the_noise_is_refused(changes: dict[str, Any], message: str) -> None:
    Config.from_flat(changes)
    with pytest.raises(ConfigError) as refused:
        Config.from_flat({"privacy.epsilon": 3.0} | ALONE | changes)
    assert message in str(refused.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    require_opacus(Config())
    with pytest.raises(ConfigError, match=r"privacy.epsilon = 3.0 needs opacus at every client; run there: pip inst"):
        require_opacus(Config.from_flat({"privacy.epsilon": 3.0} | ALONE))


def replies(node: dict[str, Any], **asked: Any) -> list[Message]:
    """Of a node that was started with these keys, to all that the server may ask."""
    grid = LocalGrid(client_app, 2)
    grid.contexts[grid.node(0)].node_config |= node
    where = {"evaluate.where": "clients", "evaluate.holdout": 0.2}
    config = Config.from_flat(TINY | ALONE | where | {"partition.clients": 2} | asked)
    content = RecordDict({"arrays": ArrayRecord(initial_weights(config.model, 0)), "config": order(config)})
    kinds = ("query.describe", "train", "evaluate")
    return [reply for kind in kinds for reply in grid.send_and_receive([Message(content.copy(), grid.node(0), kind)])]


EPSILON = "this node wants privacy.epsilon of at most 2, and the server's is "
DELTA = "this node wants privacy.delta of at most {}, and the server's is {}; lower it there, or raise the node's max-d"


@pytest.mark.parametrize(
    ("node", "epsilon", "delta", "refused"),
    [
        ({"max-epsilon": 2.0}, 8.0, 1e-5, EPSILON + "8 (0: none)"),
        ({"max-epsilon": 2}, 0.0, 1e-5, EPSILON + "0 (0: none)"),
        ({"max-epsilon": 8}, 8.0, 1e-5, ""),
        ({"max-epsilon": 8}, 8.0, 2e-5, DELTA.format("1e-05", "2e-05")),
        ({"max-epsilon": 8, "max-delta": 1e-3}, 8.0, 1e-3, ""),
        ({"max-epsilon": 8, "max-delta": 1e-7}, 8.0, 1e-5, DELTA.format("1e-07", "1e-05")),
        ({}, 0.0, 1e-3, ""),
    ],
)
@needs_opacus
def test_a_node_may_want_more_privacy_than_the_server(
    node: dict[str, Any], epsilon: float, delta: float, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    described, *others = replies(node, **{"privacy.epsilon": epsilon, "privacy.delta": delta})
    told = [str(described.content["name"].get("trouble", ""))]
    told += [reply.error.reason if reply.has_error() else "" for reply in others]
    assert len(told) == 3
    assert all(each.startswith(refused) and bool(each) == bool(refused) for each in told)
    assert (tmp_path / "fedmitr/privacy.jsonl").exists() == (bool(epsilon) and not refused)


@needs_opacus
def test_a_node_s_limit_bounds_all_runs_together(tmp_path: Path) -> None:
    node = {"max-epsilon": 7, "work-path": str(tmp_path / "work")}
    refused = "this node's max-epsilon = 7 bounds all uploads of its images together: "
    for seed in range(3):
        described, trained, _ = replies(node, **{"privacy.epsilon": 3.0, "seed": seed})
        trouble = str(described.content["name"].get("trouble", ""))
        assert trouble.startswith(refused) == trained.has_error() == (seed == 2)
    lines = (tmp_path / "work/privacy.jsonl").read_text().splitlines()
    assert [2.7 < json.loads(line)["epsilon"] <= 3.0 for line in lines] == [True, True]
    assert stat.S_IMODE((tmp_path / "work/privacy.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "work").stat().st_mode) == 0o700


@needs_opacus
def test_what_was_spent_is_in_the_run(tmp_path: Any) -> None:
    flat = TINY | ALONE | {"out-dir": str(tmp_path), "privacy.epsilon": 8.0}
    server_app(LocalGrid(client_app, 3), server_context(flat))
    (path,) = tmp_path.iterdir()
    result = RunFolder.open(path).read_result()
    assert all(7.5 < spent <= 8.0 for spent in result["epsilon"])
    assert [upload.epsilon for upload in RunFolder.open(path).load_uploads()] == result["epsilon"]
    with pytest.raises(RunError, match=r"privacy\.epsilon"):
        pipeline.fuse(RunFolder.open(path), "fedavg", {"privacy.epsilon": 0.0})
