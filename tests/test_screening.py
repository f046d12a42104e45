"""Screening: by hand on vectors, and on small models of which some were trained honestly and some were not."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CPU, same, settings
from torch import Tensor

from fedmitr_flwr import pipeline
from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.errors import ModelError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import DataSet, Images
from fedmitr_flwr.merging.closed_form import statistics_of
from fedmitr_flwr.resolve import resolve
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.screening import sums
from fedmitr_flwr.screening.answers import Names, strange_answers
from fedmitr_flwr.screening.findings import Finding
from fedmitr_flwr.screening.screen import _bounded, screen
from fedmitr_flwr.screening.sums import strange_sums
from fedmitr_flwr.screening.weights import Measured, _directions, mean_cosines, robust_z, strange_weights
from fedmitr_flwr.statistics.moments import measure, packed, problem, sent
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import build_vit, initial_weights

Log = pytest.LogCaptureFixture
Learned = tuple[Config, list[Upload], Upload]
START = {"w": torch.zeros(6), "n": torch.tensor(3)}
DIGITS: dict[str, Any] = {"screen.mode": "exclude", "method": "fedavg", "partition.clients": 5}
# That each client has images of: bars at the top, in the middle, at the bottom.
CLASSES = ((0, 1, 2), (0, 1, 2), (0, 1), (1, 2), (0, 1, 2), (0, 2))
LEARNED: dict[str, Any] = {"model.width": 32, "model.num-classes": 3, "partition.clients": 6, "screen.mode": "exclude"}
LEARNED |= {"local.epochs": 20, "local.batch-size": 8, "local.lr": 3e-3, "ensemble.combine": "probs"}
LIES = {"exchanged": lambda sums: sums.roll(1, 0), "turned": lambda sums: -sums, "zeros": lambda sums: 0 * sums}


def arrows(*rows: Sequence[float], sizes: Sequence[int] = ()) -> list[Upload]:
    """Uploads of one vector each; the start is 0."""
    every = enumerate(zip(rows, sizes or [10] * len(rows), strict=True))
    return [Upload(k, {"w": torch.tensor(row) * 1.0, "n": torch.tensor(3)}, size, 0.0, "") for k, (row, size) in every]


def found(uploads: Sequence[Upload]) -> dict[int, str]:
    return {finding.client: finding.check for finding in strange_weights(uploads, START)}


def similar(count: int, seed: int = 0) -> list[list[float]]:
    """Arrows that have one direction in common, of lengths that differ by up to a half."""
    rng = stream(seed, "arrows")
    spread = torch.rand(count, 6, generator=rng) + torch.tensor([1.0, 0, 0, 0, 0, 0])
    return (spread * (1 + torch.rand(count, 1, generator=rng) / 2)).tolist()


def times(row: Sequence[float], factor: float) -> list[float]:
    return [factor * value for value in row]


def test_robust_z_by_hand() -> None:
    """Median 3, deviations 2, 1, 0, 1, 97: their median is 1, so the unit is 1.4826."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])
    expected = [(value - 3) / 1.4826 for value in (1, 2, 3, 4, 100)]
    assert robust_z(values, 0.1).tolist() == pytest.approx(expected)
    assert robust_z(values, 2.0).tolist() == pytest.approx([-1, -0.5, 0, 0.5, 48.5])


@given(st.integers(3, 12), st.integers(0, 1000), st.data())
def test_of_similar_updates_a_scaled_and_an_unmoved_one_are_strange(count: int, seed: int, data: st.DataObject) -> None:
    rows = similar(count, seed)
    assert found(arrows(*rows)) == {}
    who = data.draw(st.integers(0, count - 1))
    if count >= 5:
        for factor, check in ((100.0, "norm"), (0.001, "norm"), (0.0, "norm"), (-1.0, "direction")):
            assert found(arrows(*rows[:who], times(rows[who], factor), *rows[who + 1 :])) == {who: check}


def test_what_is_strange_by_hand() -> None:
    """60 times the images, and 10 times as far: not much further than a random walk. Without them it is strange."""
    three, five, (first, *eight), ten = similar(3), similar(5), similar(8), similar(10)
    for rows, sizes, strange in (
        ([times(ten[0], -1), times(ten[1], -1), *ten[2:]], [10] * 10, {0: "direction", 1: "direction"}),
        ([times(ten[0], 100), times(ten[1], 90), *ten[2:]], [10] * 10, {0: "norm", 1: "norm"}),
        ([times(ten[0], -1), *ten[1:3]], [10] * 3, {0: "direction"}),  # one of three
        ([times(first, 10), *eight], [1500] + [25] * 7, {}),
        ([times(first, 10), *eight], [150] * 8, {0: "norm"}),
        ([*five[:4], five[1]], [10] * 5, {4: "copy"}),
        (three, [1001, 50, 50], {0: "size"}),
        (three, [999, 50, 50], {}),
        ([three[0], times(three[1], 1000)], [1, 20], {1: "size"}),  # of two, no more can be said
    ):
        assert found(arrows(*rows, sizes=sizes)) == strange
    assert "client 1" in strange_weights(arrows(*five[:4], times(five[1], 1.00001)), START)[0].text
    for sizes, clear in (([99_999, 50, 50], False), ([100_001, 50, 50], True), ([100_001, 50], False)):
        (finding,) = strange_weights(arrows(*three[: len(sizes)], sizes=sizes), START)
        assert finding.clear is clear, sizes


def test_what_no_honest_client_can_be_is_clear() -> None:
    """Limits: a length of e^2.5 = 12.2 times the median's, a mean cosine of -0.3, and nothing left of the start."""
    equal = [[1.0, 0, 0, 0, 0, 0]] * 4
    for factor, clear in ((12.0, False), (12.4, True), (1 / 12.0, False), (1 / 12.4, True)):
        found = strange_weights(arrows(*equal, times(equal[0], factor)), START)
        assert [each.clear for each in found if each.check == "norm"] == [clear], factor
    for cosine, clear in ((-0.29, False), (-0.31, True)):
        away = [cosine, (1 - cosine**2) ** 0.5, 0, 0, 0, 0]
        units_KK = torch.tensor(away + equal[0]).reshape(2, 6)[[1, 1, 1, 0]].double()
        (finding,) = _directions(arrows(*equal[:3], away), units_KK @ units_KK.T)
        assert (finding.check, finding.clear) == ("direction", clear), cosine
    start = {"w": torch.randn(100, 100, generator=stream(0)), "head.weight": torch.ones(3, 3)}
    fresh = {"w": torch.randn(100, 100, generator=stream(1)), "head.weight": torch.ones(3, 3)}
    mostly = {**start, "w": 0.1 * start["w"] + fresh["w"]}
    uploads = [Upload(k, weights, 10, 0.0, "") for k, weights in enumerate((start, mostly, fresh))]
    kept_K = Measured.of(uploads, start).kept
    assert kept_K.tolist() == pytest.approx([1.0, 0.1, 0.0], abs=0.02)
    assert [each.client for each in strange_weights(uploads, start) if each.check == "start" and each.clear] == [2]


def test_names_by_hand() -> None:
    """Two images of each of three classes; the model calls 0 one, 1 zero, and 2 two in one image of two, else one."""
    targets = torch.tensor([0, 0, 1, 1, 2, 2])
    answers = torch.eye(3)[[1, 1, 0, 0, 2, 1]]
    names = Names.of(answers, targets)
    chance = (2 / 6 + 3 / 6 + 1 / 6) / 3
    assert (names.right, names.chance, names.best, names.gain) == pytest.approx((1 / 6, chance, 5 / 6, 0.5))
    assert (names.kept, names.sure) == pytest.approx(((1 / 6 - 1 / 3) / 0.5, 2 / 3))
    wanted = math.log(3) / 3 + math.log(2) / 2 + math.log(6) / 6  # of its names 2, 3, 1
    assert names.information == pytest.approx(wanted)
    perfect = Names.of(torch.eye(3)[targets], targets)
    assert (perfect.right, perfect.kept) == (1.0, 1.0)
    constant = Names.of(torch.eye(3)[[1] * 6], targets)  # knows one class only: nothing can be said of it
    assert (constant.right, constant.gain, constant.kept) == (pytest.approx(1 / 3), 0.0, 1.0)
    assert (constant.sure, constant.information) == (pytest.approx(2 / 3), 0.0)
    guess = Names.of(torch.full((6, 3), 1 / 3), targets)
    assert (guess.sure, guess.information) == pytest.approx((0.0, 0.0), abs=1e-6)


@pytest.fixture(scope="module")
def learned(tiny: DataSet) -> Learned:
    """Six honest clients, and client 1 once more, with 0 for 1, 1 for 2 and 2 for 0."""
    config, labels = settings(**LEARNED), tiny.train.labels
    half = torch.arange(len(labels)) % 2
    own = [torch.isin(labels, torch.tensor(of)) & (half == client % 2) for client, of in enumerate(CLASSES)]
    honest = [learn(config, tiny, client, own[client]) for client in range(6)]
    return config, honest, learn(config, tiny, 1, own[1], turn=1)


def learn(config: Config, data: DataSet, client: int, own: Tensor, turn: int = 0) -> Upload:
    images = data.train.subset(own.nonzero().squeeze(1))
    vit = build_vit(config.model)
    vit.load_state_dict(initial_weights(config.model, config.seed))
    labelled = Images(images.pixels, (images.labels + turn) % 3)
    loss = train_local(vit, labelled, config, stream(0, "bars", client), CPU)
    return Upload(client, dict(vit.state_dict()), len(images), loss, "c" * 12)


def changed(config: Config, upload: Upload, change: Callable[[Tensor, Tensor], Tensor]) -> Upload:
    """`change(start, update)` of every tensor."""
    start = initial_weights(config.model, config.seed)
    return replace(upload, weights={n: change(start[n], w - start[n]) for n, w in upload.weights.items()})


ATTACKS: dict[str, tuple[Callable[[Config, Upload], Upload], str]] = {
    "scaled": (lambda config, upload: changed(config, upload, lambda start, update: start + 100 * update), "norm"),
    "reversed": (lambda config, upload: changed(config, upload, lambda start, update: start - update), "direction"),
    "random": (lambda config, upload: replace(upload, weights=dict(build_vit(config.model, 9).state_dict())), "start"),
}


def attacked(learned: Learned, name: str) -> list[Upload]:
    """The uploads of which client 1's is not honest; "permuted": trained on other labels."""
    config, uploads, turned = learned
    bad = ATTACKS[name][0](config, uploads[1]) if name in ATTACKS else turned
    return [uploads[0], bad, *uploads[2:]]


@pytest.mark.parametrize("name", [*ATTACKS, "permuted"])
def test_each_attack_is_found_and_no_other_client(learned: Learned, name: str, caplog: Log) -> None:
    config, uploads = learned[0], attacked(learned, name)
    check, images = (ATTACKS[name][1], 0) if name in ATTACKS else ("answers", 4)
    lines: list[dict[str, Any]] = []
    caplog.set_level(logging.WARNING, "fedmitr")
    outcome = screen(uploads, config, CPU, lambda **values: lines.append(values), images)
    assert [(finding.client, finding.check) for finding in outcome.findings] == [(1, check)]
    assert (outcome.excluded, outcome.kept) == ([1], [uploads[0], *uploads[2:]])
    assert [(line["stage"], line["client"], line["excluded"]) for line in lines] == [("screen", 1, True)]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("client 1 is unusual: ")
    assert warning.endswith("(left out; if it is honest, fuse the run again with screen.mode = 'warn')")
    assert outcome.facts("exclude")["findings"][0]["check"] == check
    assert math.isfinite(outcome.findings[0].value)


def test_who_was_not_trained_is_found_by_its_answers_alone(learned: Learned) -> None:
    """Fresh weights are as far from the start as long training goes: their length need not tell."""
    uploads = attacked(learned, "random")
    (finding,) = strange_answers(uploads, learned[0], CPU, images=4)
    assert (finding.client, finding.check) == (1, "unsure")
    assert strange_answers(uploads[:4], learned[0], CPU) == []  # too few to judge


@pytest.mark.parametrize("outliers", [0.0, 1.0])
def test_a_client_of_one_class_is_not_strange(learned: Learned, tiny: DataSet, outliers: float) -> None:
    """It gives every image the same answer, too, but is sure of it; or else it can be led to its own class only."""
    config, uploads, _ = learned
    config = Config.from_flat({"local.outliers": outliers, "local.epochs": 60}, base=config)
    one_class = learn(config, tiny, 1, tiny.train.labels == 1)
    found = strange_answers([uploads[0], one_class, *uploads[2:]], config, CPU, images=4)
    assert 1 not in {finding.client for finding in found}


def normalised(client: int, images: int, classes: Sequence[int], width: int = 8) -> Upload:
    """Features as taps are, with much in common."""
    common, by_class = (torch.randn(*shape, width, generator=stream(0, "means")) for shape in ((1,), (3,)))
    labels = torch.tensor(classes).repeat(images // len(classes))
    own = torch.randn(len(labels), width, generator=stream(0, "features", client))
    z = torch.nn.functional.layer_norm(2 * common + by_class[labels] + 0.5 * own, (width,), eps=0.0)
    counts = tuple(torch.bincount(labels, minlength=3).tolist())
    return Upload(client, {}, len(labels), 0.5, "c" * 12, counts, statistics=measure(z, labels, 3))


def test_statistics_that_contradict_all_others_are_clear_and_honest_ones_are_not() -> None:
    """Whatever classes a client has; a liar among the references makes no honest client wrong."""
    honest = [normalised(k, 60, classes) for k, classes in enumerate(((0, 1, 2), (0, 1, 2), (0, 1), (1, 2), (2,)))]
    assert strange_sums(honest) == strange_sums(honest[:2]) == []
    for name, lie in LIES.items():
        sums = lie(statistics_of(honest[0]).sums)
        lying = [replace(honest[0], statistics={**honest[0].statistics, "sums": sums}), *honest[1:]]
        as_sent = sent(lying[0].statistics)
        assert problem(as_sent, lying[0].class_counts, as_sent) is None, name  # sums that could be
        (finding,) = strange_sums(lying)
        assert (finding.client, finding.check, finding.clear) == (0, "sums", True), name
    assert finding.value == pytest.approx(0.0)  # of zeros: reaches nowhere


def test_a_claim_counts_ten_times_all_others_at_most() -> None:
    honest = [normalised(k, 30, (0, 1, 2)) for k in range(3)]
    own = statistics_of(honest[0])
    times_30 = {"sums": 30 * own.sums, "moment": packed(30 * own.moment)}
    large = replace(honest[0], num_examples=900, class_counts=(300,) * 3, statistics=times_30)
    for mode, images in (("warn", 900), ("clear", 600)):
        config = settings(**DIGITS | {"screen.mode": mode})
        bounded = screen([replace(moved(k), num_examples=n) for k, n in ((0, 900), (1, 30), (2, 30))], config, CPU)
        assert [upload.num_examples for upload in bounded.kept] == [images, 30, 30]
        assert (bounded.excluded, bounded.changed) == ([], mode == "clear")
    (bounded, *others) = _bounded([large, *honest[1:]])
    assert (bounded.num_examples, bounded.class_counts, others) == (600, (200,) * 3, honest[1:])
    for part in ("counts", "sums", "moment"):  # as of 20 times the images it has
        torch.testing.assert_close(getattr(statistics_of(bounded), part), 20 * getattr(own, part))


def test_honest_clients_stay_and_by_default_only_what_is_clear_is_left_out(learned: Learned, caplog: Log) -> None:
    honest = screen(learned[1], learned[0], CPU, images=4)
    assert (honest.findings, honest.excluded, honest.kept) == ([], [], learned[1])
    assert Config().screen.mode == "clear"
    default, warn, off = (Config.from_flat({"screen.mode": mode}, base=learned[0]) for mode in ("clear", "warn", "off"))
    turned, bad = attacked(learned, "permuted"), attacked(learned, "scaled")
    permuted = screen(turned, default, CPU, images=4)
    assert [(finding.check, finding.clear) for finding in permuted.findings] == [("answers", False)]
    assert permuted.kept == turned
    assert screen(bad, default, CPU, images=0).excluded == [1]
    caplog.clear()
    nothing = screen(bad, off, CPU)
    assert (nothing.kept, nothing.findings, caplog.text) == (bad, [], "")
    warned = screen(bad, warn, CPU, images=0)
    assert (warned.kept, [finding.client for finding in warned.findings]) == (bad, [1])
    assert "screen.mode = 'exclude' leaves it out" in caplog.text


def test_honest_clients_of_little_training_point_apart_and_stay() -> None:
    """Two steps on 30 images of one class or two: an update is then of its labels more than of anything in common."""
    changes = {"data.train-limit": 150, "partition.alpha": 0.1, "partition.min-size": 5, "partition.clients": 5}
    changes |= {"local.epochs": 2, "local.optimizer": "adamw", "method": "fedavg"}
    lowest = []
    for seed in range(3):
        config = resolve(Config.from_flat({**changes, "seed": seed}))
        initial = initial_weights(config.model, seed)
        uploads = [pipeline.train_client(config, client, initial) for client in range(5)]
        found = screen(uploads, config, CPU, images=0)
        assert found.excluded == [], found.findings
        lowest.append(mean_cosines(Measured.of(uploads, initial).cosines).min().item())
    assert min(lowest) < -0.05  # the test is of such


def moved(client: int, by: float = 1.0) -> Upload:
    """The start, and `by` times an update that is half everybody's and half its own."""
    config = settings(**DIGITS)
    start, common, own = initial_weights(config.model, config.seed), stream(0, "common"), stream(0, "own", client)
    weights = {}
    for name, tensor in start.items():
        both = torch.randn(tensor.shape, generator=common) + torch.randn(tensor.shape, generator=own)
        weights[name] = tensor + by * 0.01 * both
    return Upload(client, weights, 10 + client, 0.5, "c" * 12)


def test_where_half_are_strange_all_stay(caplog: Log) -> None:
    uploads = [moved(0), moved(1), moved(2, -1.0), moved(3, -1.0)]
    outcome = screen(uploads, settings(**DIGITS), CPU)
    assert len(outcome.findings) >= 2
    assert outcome.excluded == []
    assert "too many to say who is right; none is left out" in caplog.text


def test_without_the_start_there_is_a_warning_or_with_exclude_an_error(tmp_path: Path, caplog: Log) -> None:
    uploads, lost = [moved(client) for client in range(5)], {"model.weights": str(tmp_path / "gone.safetensors")}
    assert screen(uploads, settings(**DIGITS | lost | {"screen.mode": "warn"}), CPU, images=0).findings == []
    assert "not by weights" in caplog.text
    with pytest.raises(ModelError, match="gone"):
        screen(uploads, settings(**DIGITS | lost), CPU, images=0)


def saved(path: Path, uploads: Sequence[Upload], **changes: Any) -> RunFolder:
    folder = RunFolder.create(settings(**DIGITS | {"out-dir": str(path)} | changes), "run")
    for upload in uploads:
        folder.save_upload(upload)
    pipeline.serve(folder)
    return folder


def test_a_run_goes_on_without_the_excluded_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model as of the honest uploads alone; the strange one stays on disk."""
    # Weights that are no training's answer like no one else's.
    monkeypatch.setattr("fedmitr_flwr.screening.screen.strange_answers", lambda *_: [])
    honest = [moved(client) for client in range(4)]
    folder = saved(tmp_path / "poisoned", [*honest, moved(4, 100.0)])
    alone = saved(tmp_path / "alone", honest, **{"screen.mode": "off", "flower.quorum": 0.8})
    assert same(*(load_tensors(run.model_path)[0] for run in (folder, alone)))
    assert list(folder.upload_paths()) == [0, 1, 2, 3, 4]
    result = folder.read_result()
    assert result["screen"]["excluded"] == [4]
    assert [each["client"] for each in result["screen"]["findings"]] == [4]
    assert result["accuracy"] == alone.read_result()["accuracy"]
    assert result["accuracy"]["local"][4] is None
    lines = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    assert [(line["client"], line["check"]) for line in lines if line["stage"] == "screen"] == [(4, "norm")]
    assert alone.read_result()["screen"] == {"mode": "off", "excluded": [], "findings": []}
    # `fedmitr fuse` screens alike, by its own settings.
    assert pipeline.fuse(folder, "fedavg", {}).read_result()["screen"]["excluded"] == [4]
    warned = pipeline.fuse(folder, "fedavg", {"screen.mode": "warn"}).read_result()
    assert (warned["screen"]["excluded"], len(warned["screen"]["findings"])) == ([], 1)
    assert warned["accuracy"]["fedavg"] != result["accuracy"]["fedavg"]


def test_of_many_clients_each_is_compared_with_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "MOST", 2)
    assert [sums._others("abcde", k) for k in (0, 3)] == [["b", "c"], ["e", "a"]]
    assert sums._others("abc", 1) == ["a", "c"]


def test_many_findings_are_few_lines(monkeypatch: pytest.MonkeyPatch, caplog: Log) -> None:
    monkeypatch.setattr("fedmitr_flwr.screening.screen._MOST", 1)
    copies = [Finding(client, "copy", 1.0, "it is a copy") for client in range(5)]
    monkeypatch.setattr("fedmitr_flwr.screening.screen._findings", lambda *_: copies)
    assert screen(arrows(*similar(5)), settings(**{"screen.mode": "warn"}), CPU).findings == copies
    assert caplog.records[-1].getMessage().endswith("and 4 more clients; metrics.jsonl says which")
    assert len({record.getMessage().removeprefix("fedmitr: ") for record in caplog.records}) == 2
