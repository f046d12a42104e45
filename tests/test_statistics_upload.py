"""Statistics on their way: from a client's images through file, check, digest and Flower's messages to the server."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from local_grid import TINY, LocalGrid, server_context
from tiny import same
from torch import Tensor

from client_app.app import app as client_app
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import ConfigError, DiskError, RunError, UploadError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.statistics.moments import frozen_features, measure, names
from fedmitr_flwr.uploads.upload import Upload, digest, load, save, size, validate
from fedmitr_flwr.vit.build import build_vit, initial_weights
from server_app.app import app as server_app
from server_app.records import order, read_upload

CODE = "0123456789ab"
LABELS = torch.tensor([0] * 3 + [2] * 9)
REFERENCE = {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}


def an_upload(variances: bool = False) -> Upload:
    statistics = measure(torch.randn(12, 4, generator=stream(0)), LABELS, 3, variances=variances)
    return Upload(1, dict(REFERENCE), 12, 0.5, CODE, (3, 0, 9), statistics=statistics)


def changed(upload: Upload, name: str, change: Callable[[Tensor], Tensor]) -> Upload:
    return replace(upload, statistics={**upload.statistics, name: change(upload.statistics[name])})


def check(upload: Upload, extras: str = "statistics") -> None:
    config = settings(**{"model.num-classes": 3, "partition.clients": 4, "upload.extras": extras})
    validate(upload, REFERENCE, config, CODE)


@pytest.mark.parametrize("variances", [False, True])
def test_statistics_come_back_from_disk_bit_by_bit(tmp_path: Path, variances: bool) -> None:
    sent = replace(an_upload(variances), weights={"w": torch.tensor([1.5], dtype=torch.float16)})
    save(sent, tmp_path / "u")
    got = load(tmp_path / "u")
    assert same(got.statistics, sent.statistics)
    assert {tensor.dtype for tensor in got.statistics.values()} == {torch.float64}
    assert {name: tensor.tolist() for name, tensor in got.weights.items()} == {"w": [1.5]}
    assert got.weights["w"].dtype == torch.float32
    assert digest(got) == digest(replace(sent, weights={"w": torch.tensor([1.5])}))
    assert got.num_bytes == sent.num_bytes == 2 + 8 * (12 + 10 + 12 * variances)


def test_an_upload_without_statistics_has_none_on_disk(tmp_path: Path) -> None:
    save(replace(an_upload(), statistics=None), tmp_path / "u")
    assert load(tmp_path / "u").statistics is None
    # A name of this form is a weight's own, unless there are statistics.
    save(Upload(0, {"statistics/x": torch.ones(1)}, 1, 0.5, CODE), tmp_path / "v")
    assert load(tmp_path / "v").weights.keys() == {"statistics/x"}


def test_the_digest_sees_every_sum() -> None:
    upload = an_upload(variances=True)
    others = [changed(upload, name, lambda tensor: tensor * (1 + 1e-15)) for name in upload.statistics]
    others += [replace(upload, statistics=None), an_upload(variances=False)]
    assert len({digest(each) for each in [upload, *others]}) == 6
    assert digest(upload) == digest(an_upload(variances=True))


def test_what_was_asked_for_passes() -> None:
    check(an_upload())
    check(an_upload(variances=True), extras="variances")
    check(replace(an_upload(), statistics=None), extras="")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda upload: replace(upload, statistics=None), r"are \[\], not \['moment', 'sums'\] \(upload.extras"),
        (lambda upload: replace(upload, statistics={"sums": upload.statistics["sums"]}), r"are \['sums'\], not"),
        (lambda upload: changed(upload, "sums", lambda t: t + 50), "are no sums of features: .* has a sum"),
        (lambda upload: replace(upload, class_counts=(11, 0, 1)), "are no sums of features: .*negative eigenvalue"),
        (lambda upload: replace(upload, class_counts=None), "statistics without class counts"),
    ],
)
def test_corrupt_statistics_are_refused_by_name(change: Callable[[Upload], Upload], told: str) -> None:
    with pytest.raises(UploadError, match=f"^client 1: .*{told}"):
        check(change(an_upload()))


def test_statistics_that_were_not_asked_for_are_refused() -> None:
    with pytest.raises(UploadError, match=r"^client 1: its statistics are \['moment', 'sums'\], not \[\]"):
        check(an_upload(), extras="")


def settings(**changes: Any) -> Config:
    return Config.from_flat(TINY | {"partition.clients": 2, "upload.extras": "statistics"} | changes)


def ask(config: Config, client: int = 0) -> Message:
    grid = LocalGrid(client_app, 2)
    content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord(dict(order(config)))})
    (reply,) = grid.send_and_receive([Message(content, grid.node(client), "train")])
    return reply


def test_a_client_tells_the_sums_of_its_own_unaugmented_images_before_training() -> None:
    config = settings(**{"upload.extras": "variances", "upload.dtype": "float16"})
    initial = initial_weights(config.model, config.seed)
    upload = pipeline.train_client(config, 1, initial)
    vit = build_vit(config.model)
    vit.load_state_dict(initial)
    images = client_images(config, 1)[0]
    features = frozen_features(vit, images, config.model, torch.device("cpu"))
    wanted = measure(features, images.labels, 10, variances=True)
    assert tuple(upload.statistics) == names(config.upload) == ("sums", "moment", "squares")
    assert same(upload.statistics, wanted)
    assert upload.class_counts == tuple(torch.bincount(images.labels, minlength=10).tolist())


def test_statistics_change_nothing_else_in_an_upload() -> None:
    initial = initial_weights(settings().model, 0)
    with_them = pipeline.train_client(settings(), 0, initial)
    without = pipeline.train_client(settings(**{"upload.extras": ""}), 0, initial)
    assert without.statistics is None
    assert without.class_counts is None
    assert with_them.train_loss == without.train_loss
    assert same(with_them.weights, without.weights)


@pytest.mark.parametrize("extras", ["statistics", "variances", "statistics, moments", "moments"])
def test_statistics_arrive_as_they_were_made(extras: str) -> None:
    config = settings(**{"upload.dtype": "float16", "upload.extras": extras})
    initial = initial_weights(config.model, config.seed)
    made = pipeline.train_client(config, 1, initial)
    reply = ask(config, client=1)
    assert set(reply.content) == {"arrays", "metrics", "statistics"}
    read = read_upload(reply, 1, config)
    assert same(read.statistics, made.statistics)
    assert read.class_counts == made.class_counts
    assert read.num_bytes == made.num_bytes
    validate(read, initial, config, made.fingerprint)


def test_nothing_of_the_kind_is_sent_by_default() -> None:
    reply = ask(settings(**{"upload.extras": ""}))
    assert set(reply.content) == {"arrays", "metrics"}
    assert "class-counts" not in reply.content["metrics"]


def federate(out: Path, tamper: Any = None, **changes: Any) -> RunFolder:
    settings = TINY | {"method": "lda", "upload.extras": "statistics", "out-dir": str(out)} | changes
    server_app(LocalGrid(client_app, 3, tamper=tamper), server_context(settings))
    return RunFolder.open(next(out.iterdir()))


@pytest.mark.parametrize(("method", "extras"), [("lda", "statistics"), ("regmean", "moments")])
def test_the_flower_path_gives_the_bits_of_the_straight_line(tmp_path: Path, method: str, extras: str) -> None:
    asked = {"method": method, "upload.extras": extras}
    flower = federate(tmp_path / "flower", **asked)
    line = TINY | asked | {"partition.clients": 3, "out-dir": str(tmp_path)}
    straight = pipeline.run(Config.from_flat(line), "line")
    for ours, theirs in zip(flower.upload_paths().values(), straight.upload_paths().values(), strict=True):
        assert digest(load(ours)) == digest(load(theirs))
    assert same(*(load_tensors(folder.model_path)[0] for folder in (flower, straight)))
    result = flower.read_result()
    assert result["bytes_statistics"] == straight.read_result()["bytes_statistics"]
    assert method == "regmean" or result["bytes_statistics"] == [8 * (10 * 32 + 32 * 33 // 2)] * 3
    sent = zip(result["bytes_statistics"], result["bytes_down"], strict=True)
    assert result["bytes_up"] == [statistics + bytes_down for statistics, bytes_down in sent]
    assert result["accuracy"] == straight.read_result()["accuracy"]


def test_room_is_asked_for_with_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that has room for three models and not for more."""
    free = 3 * size(initial_weights(settings().model, 0))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    told = {"method": "fedavg", "upload.extras": ""}
    assert federate(tmp_path / "weights", **told).finished
    with pytest.raises(DiskError, match=r"and 3 uploads take .* MB; make room there"):
        federate(tmp_path / "more", **told | {"upload.extras": "moments"})


def test_an_upload_with_corrupt_statistics_is_refused_by_name_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def tamper(reply: Message, client: int) -> list[Message]:
        if client == 1:
            tensors = reply.content["statistics"].to_torch_state_dict()
            reply.content["statistics"] = ArrayRecord({**tensors, "moment": -tensors["moment"]})
        return [reply]

    with pytest.raises(RunError, match=r"2 of 3 uploads .* missing: client 1"):
        federate(tmp_path, tamper)
    folder = RunFolder.open(next(tmp_path.iterdir()))
    (refused,) = folder.refused_path.glob("*.safetensors")
    tensors, header = load_tensors(refused)
    assert "client 1: its statistics are no sums of features" in header["reason"]
    assert "client 1: its statistics are no sums of features" in caplog.text
    assert {"sums", "moment", "head.weight"} <= set(tensors)  # nothing is lost


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"upload.extras": ""}, "method = 'lda' needs the clients' statistics"),
        ({"upload.extras": "", "method": "ridge"}, "method = 'ridge' needs .*set upload.extras = 'statistics'"),
        ({"method": "fedpft"}, "set upload.extras = 'variances'"),
        ({"method": "feddf"}, "method = 'feddf' needs real images without labels; set feddf.path"),
        ({"upload.extras": "", "method": "regmean"}, "method = 'regmean' needs second .*set upload.extras = 'moments'"),
        ({"flower.strategy": "fedavg"}, "upload.extras = 'statistics': fedavg averages all"),
        (
            {"flower.strategy": "fedavg", "upload.extras": "counts, moments"},
            "upload.extras = 'counts, moments': fedavg averages all that is uploaded; leave out all but counts, ",
        ),
    ],
)
def test_what_a_method_lacks_is_told_before_any_client_is_asked(changes: dict[str, Any], told: str) -> None:
    grid = LocalGrid(client_app, 2)
    context = server_context(TINY | {"method": "lda", "upload.extras": "statistics"} | changes)
    with pytest.raises(ConfigError, match=told):
        server_app(grid, context)
    assert not grid.asked


@pytest.mark.parametrize("method", ["lda", "ridge", "fedpft", "feddf", "regmean"])
def test_what_a_method_lacks_leaves_no_folder(tmp_path: Path, method: str) -> None:
    config = Config.from_flat(TINY | {"method": method, "out-dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=f"method = '{method}' needs"):
        pipeline.run(config, "none")
    assert not list(tmp_path.iterdir())
