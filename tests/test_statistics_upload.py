"""Statistics on their way: from a client's images through file, check, digest and Flower's messages to the server."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message
from local_grid import TINY, Federate, LocalGrid, server_context
from tiny import same
from torch import Tensor

from client_app.app import app as client_app
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import ConfigError, UploadError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.statistics.moments import frozen_features, measure, names
from fedmitr_flwr.uploads.upload import Upload, digest, load, save, size, validate
from fedmitr_flwr.vit.build import build_vit, initial_weights
from server_app.app import app as server_app

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


def test_statistics_come_back_from_disk_bit_by_bit(tmp_path: Path) -> None:
    sent = replace(an_upload(variances=True), weights={"w": torch.tensor([1.5], dtype=torch.float16)})
    save(sent, tmp_path / "u")
    got = load(tmp_path / "u")
    assert same(got.statistics, sent.statistics)
    assert {tensor.dtype for tensor in got.statistics.values()} == {torch.float64}
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in got.weights.items()} == {
        "w": (torch.float32, [1.5])
    }
    assert digest(got) == digest(replace(sent, weights={"w": torch.tensor([1.5])}))
    assert got.num_bytes == sent.num_bytes == 2 + 8 * (12 + 10 + 12)
    # A name of this form is a weight's own, unless there are statistics.
    save(Upload(0, {"statistics/x": torch.ones(1)}, 1, 0.5, CODE), tmp_path / "v")
    assert load(tmp_path / "v").weights.keys() == {"statistics/x"}
    assert load(tmp_path / "v").statistics is None


def test_the_digest_sees_every_sum() -> None:
    upload = an_upload(variances=True)
    others = [changed(upload, name, lambda tensor: tensor * (1 + 1e-15)) for name in upload.statistics]
    others += [replace(upload, statistics=None), an_upload(variances=False)]
    assert len({digest(each) for each in [upload, *others]}) == 6
    assert digest(upload) == digest(an_upload(variances=True))


def test_what_was_asked_for_passes_and_what_is_corrupt_is_refused_by_name() -> None:
    sound = an_upload()
    check(sound)
    check(an_upload(variances=True), extras="variances")
    check(replace(sound, statistics=None), extras="")
    for upload, told in (
        (replace(sound, statistics=None), r"are \[\], not \['moment', 'sums'\] \(upload.extras"),
        (replace(sound, statistics={"sums": sound.statistics["sums"]}), r"are \['sums'\], not"),
        (changed(sound, "sums", lambda tensor: tensor + 50), "are no sums of features: .* has a sum"),
        (replace(sound, class_counts=(11, 0, 1)), "are no sums of features: .*negative eigenvalue"),
        (replace(sound, class_counts=None), "statistics without class counts"),
    ):
        with pytest.raises(UploadError, match=f"^client 1: .*{told}"):
            check(upload)
    with pytest.raises(UploadError, match=r"^client 1: its statistics are \['moment', 'sums'\], not \[\]"):
        check(sound, extras="")


def settings(**changes: Any) -> Config:
    return Config.from_flat(TINY | {"partition.clients": 2, "upload.extras": "statistics"} | changes)


def test_a_client_tells_the_sums_of_its_own_unaugmented_images_before_training() -> None:
    """And they change nothing else in an upload."""
    config = settings(**{"upload.extras": "variances", "upload.dtype": "float16"})
    initial = initial_weights(config.model, config.seed)
    upload = pipeline.train_client(config, 1, initial)
    vit = build_vit(config.model)
    vit.load_state_dict(initial)
    images = client_images(config, 1)[0]
    features = frozen_features(vit, images, config.model, torch.device("cpu"))
    assert tuple(upload.statistics) == names(config.upload) == ("sums", "moment", "squares")
    assert same(upload.statistics, measure(features, images.labels, 10, variances=True))
    assert upload.class_counts == tuple(torch.bincount(images.labels, minlength=10).tolist())
    without = pipeline.train_client(settings(**{"upload.extras": "", "upload.dtype": "float16"}), 1, initial)
    assert (without.statistics, without.class_counts) == (None, None)
    assert upload.train_loss == without.train_loss
    assert same(upload.weights, without.weights)


LDA = {"method": "lda", "upload.extras": "statistics"}


@pytest.mark.parametrize("asked", [LDA, {"method": "regmean", "upload.extras": "variances, moments"}])
def test_the_flower_path_gives_the_bits_of_the_straight_line(
    tmp_path: Path, federate: Federate, asked: dict[str, Any]
) -> None:
    asked = asked | {"upload.dtype": "float16"}
    flower = federate(LocalGrid(client_app, 3), **asked)
    line = TINY | asked | {"partition.clients": 3, "out-dir": str(tmp_path)}
    straight = pipeline.run(Config.from_flat(line), "line")
    for ours, theirs in zip(flower.upload_paths().values(), straight.upload_paths().values(), strict=True):
        assert digest(load(ours)) == digest(load(theirs))
    assert same(*(load_tensors(folder.model_path)[0] for folder in (flower, straight)))
    result, wanted = flower.read_result(), straight.read_result()
    assert result["bytes_statistics"] == wanted["bytes_statistics"]
    assert asked["method"] == "regmean" or result["bytes_statistics"] == [8 * (10 * 32 + 32 * 33 // 2)] * 3
    sent = zip(result["bytes_statistics"], result["bytes_down"], strict=True)
    assert result["bytes_up"] == [statistics + bytes_down // 2 for statistics, bytes_down in sent]
    assert result["accuracy"] == wanted["accuracy"]


def test_room_is_asked_for_with_directions(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that has room for three models and not for more."""
    free = 3 * size(initial_weights(settings().model, 0))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert federate(LocalGrid(client_app, 3), method="fedavg").finished
    more = {"method": "fedavg", "upload.extras": "moments"}
    federate(LocalGrid(client_app, 3), r"and 3 uploads take .* MB; make room there", **more)


def test_an_upload_with_corrupt_statistics_is_refused_by_name_and_kept(
    federate: Federate, caplog: pytest.LogCaptureFixture
) -> None:
    def tamper(reply: Message, client: int) -> list[Message]:
        if client == 1:
            tensors = reply.content["statistics"].to_torch_state_dict()
            reply.content["statistics"] = ArrayRecord({**tensors, "moment": -tensors["moment"]})
        return [reply]

    folder = federate(LocalGrid(client_app, 3, tamper=tamper), r"2 of 3 uploads .* missing: client 1", **LDA)
    (refused,) = folder.refused_path.glob("*.safetensors")
    tensors, header = load_tensors(refused)
    assert "client 1: its statistics are no sums of features" in header["reason"]
    assert "client 1: its statistics are no sums of features" in caplog.text
    assert {"sums", "moment", "head.weight"} <= set(tensors)  # nothing is lost


def test_what_a_method_lacks_is_told_before_any_client_is_asked(tmp_path: Path) -> None:
    """And leaves no folder, with Flower and without."""
    for changes, told in (
        ({"method": "lda"}, "needs the clients' statistics"),
        ({"method": "ridge"}, "needs .*set upload.extras = 'statistics'"),
        ({"method": "fedpft", "upload.extras": "statistics"}, "needs .*set upload.extras = 'variances'"),
        ({"method": "feddf"}, "needs real images without labels; set feddf.path"),
        ({"method": "regmean"}, "needs second .*set upload.extras = 'moments'"),
        ({"flower.strategy": "fedavg", "upload.extras": "statistics"}, "fedavg averages all"),
        ({"flower.strategy": "fedavg", "upload.extras": "counts, moments"}, "leave out all but counts, "),
    ):
        grid, flat = LocalGrid(client_app, 2), TINY | {"out-dir": str(tmp_path)} | changes
        with pytest.raises(ConfigError, match=told):
            server_app(grid, server_context(flat))
        assert not grid.asked
        if "method" in changes:
            with pytest.raises(ConfigError, match=f"method = '{changes['method']}' {told}"):
                pipeline.run(Config.from_flat(flat), "none")
    assert not list(tmp_path.iterdir())
