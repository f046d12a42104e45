"""Reference lines: heads on frozen features, FedDF's real images, and all images in one place."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny import Sgd, fused, same, settings, small, some_images

from fedmitr_flwr import pipeline
from fedmitr_flwr.central import train_centrally
from fedmitr_flwr.cli import main
from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.errors import ConfigError, DataError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data import proxy
from fedmitr_flwr.data.images import Images
from fedmitr_flwr.data.proxy import proxy_pixels
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.inversion.scout import Weigher, scouted_ensemble
from fedmitr_flwr.merging.closed_form import teachers_of
from fedmitr_flwr.methods import feddf
from fedmitr_flwr.methods.contract import Fused
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.statistics import heads
from fedmitr_flwr.statistics.moments import frozen_features
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import build_vit, initial_weights

CPU = torch.device("cpu")


def with_statistics(**changes: Any) -> Config:
    return settings(**{"upload.extras": "variances"} | changes)


@torch.enable_grad()
def uploads_of(config: Config) -> list[Upload]:
    initial = initial_weights(config.model, config.seed)
    return [pipeline.train_client(config, client, initial) for client in range(config.partition.clients)]


@torch.enable_grad()
def made_by(config: Config, uploads: Sequence[Upload] = ()) -> Fused:
    """By clients that trained."""
    return fused(config, uploads or uploads_of(config))


@torch.no_grad()
def test_lda_is_scikit_learns_on_all_clients_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "oas", lambda _: 0.2)
    config = with_statistics(method="lda")
    made = made_by(config)
    shares = [client_images(config, client)[0] for client in range(2)]
    images = Images(torch.cat([share.pixels for share in shares]), torch.cat([share.labels for share in shares]))
    start = build_vit(config.model)
    start.load_state_dict(initial_weights(config.model, config.seed))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2)
    theirs.fit(frozen_features(start, images, small(), CPU).numpy(), images.labels.numpy())
    fresh = some_images(config, 20)
    wanted = theirs.decision_function(start.forward_head(start.forward_features(fresh), pre_logits=True).numpy())
    np.testing.assert_allclose(made.predict(fresh).numpy(), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lda", "ridge", "fedpft"])
def test_a_head_on_the_public_start_is_one_model_that_can_be_saved(method: str) -> None:
    config = with_statistics(method=method)
    made = made_by(config)
    start = initial_weights(config.model, config.seed)
    assert made.weights.keys() == start.keys()
    changed = {name for name, tensor in start.items() if not torch.equal(made.weights[name], tensor)}
    assert changed == {"head.weight", "head.bias"}
    vit = build_vit(config.model, seed=5)
    vit.load_state_dict(made.weights)
    images = some_images(config, 4)
    assert torch.equal(vit(images), made.predict(images))
    again = made_by(config)
    assert same(again.weights, made.weights)


@pytest.mark.parametrize(("statistics", "teach", "silent"), [(True, "probs", 1), (False, "logits", 0)])
def test_the_frozen_model_teaches_by_its_class_token_and_by_probabilities(
    statistics: bool, teach: str, silent: int
) -> None:
    """With its logits, and its patches, the losses were of a hundred and more: nothing else was learned."""
    config = settings(**{"upload.extras": "statistics" if statistics else ""})
    uploads, lines = uploads_of(config), list[dict[str, Any]]()
    ensemble = Weigher(uploads, config, CPU).ensemble
    assert (ensemble.teach, ensemble.silent) == (teach, silent)
    fused(config, uploads, lines)
    parts = [line for line in lines if line["stage"] == "distillation"]
    assert all(0 < line["low"] < 5 and 0 < line["kd"] < 10 for line in parts)


@torch.no_grad()
def test_the_frozen_model_is_a_teacher_that_counts_as_much_as_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmitr_flwr.ensemble.ensemble.TEMPERATURE", 1.0)
    config = with_statistics(**{"ensemble.combine": "probs"})
    uploads = uploads_of(config)
    *others, frozen = teachers_of(uploads, config)
    assert others == uploads
    assert frozen.num_examples == sum(upload.num_examples for upload in uploads)
    assert frozen.class_counts == tuple(map(sum, zip(*(upload.class_counts for upload in uploads), strict=True)))
    images = some_images(config, 6)
    model = made_by(Config.from_flat({"method": "lda"}, config), uploads).predict
    given = scouted_ensemble(uploads, config, CPU)(images).softmax(1)
    without = Config.from_flat({"upload.extras": ""}, config)
    clients = scouted_ensemble(uploads, without, CPU)(images).softmax(1)
    torch.testing.assert_close(given, (clients + model(images).softmax(1)) / 2)


def test_counts_can_be_weights_where_statistics_tell_them() -> None:
    config = with_statistics(**{"ensemble.weights": "counts"})
    uploads = uploads_of(config)
    weights_KY = scouted_ensemble(uploads, config, CPU).weights
    counts_KY = torch.tensor([upload.class_counts for upload in uploads], dtype=torch.float32)
    torch.testing.assert_close(weights_KY, torch.cat([counts_KY / counts_KY.sum(0), torch.ones(1, 10)]) / 2)


# --- FedDF


def proxy_settings(**changes: Any) -> Config:
    return settings(**{"method": "feddf", "data.proxy": 0.1} | changes)


@pytest.fixture(autouse=True)
def _two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feddf, "PASSES", 2)


def test_the_proxy_share_is_nobodys_and_not_for_validation() -> None:
    """Digits has 1,437 training images; no two of them are equal."""
    whole = {"data.train-limit": 0, "data.test-limit": 0, "data.validation": 0.2}
    config = proxy_settings(**whole)
    others = load(config.data, config.model)
    parts = (proxy_pixels(config), others.test.pixels, others.train.pixels)
    proxies, validation, train = ({image.numpy().tobytes() for image in part} for part in parts)
    assert len(proxies) + len(validation) + len(train) == 1437
    assert len(proxies) == pytest.approx(144, abs=5)  # 0.1 of each class, rounded
    assert len(validation) == pytest.approx(287, abs=5)
    assert not proxies & train
    assert not proxies & validation
    assert not train & validation
    before = load(settings(**whole).data, config.model)
    assert torch.equal(before.test.pixels, others.test.pixels)  # the same images judge, with or without proxies


def test_without_a_proxy_share_every_image_is_where_it_was() -> None:
    config = settings(**{"data.train-limit": 0})
    assert len(load(config.data, config.model).train) == 1437
    with pytest.raises(DataError, match=r"data.proxy = 0.0001 sets no image of any class aside; raise it"):
        proxy_pixels(proxy_settings(**{"data.proxy": 0.0001}))


def test_what_feddf_has_not_is_refused_by_name_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"distill.extrapolate = 0 .*method = 'feddf'.*; set it to 1"):
        feddf.check(proxy_settings(**{"distill.extrapolate": 0.0}))
    feddf.check(proxy_settings())


def test_a_folder_of_images_needs_no_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, folder in enumerate(("", "deep", "deep/er")):
        (tmp_path / folder).mkdir(exist_ok=True)
        image = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / folder / f"{number}.png")
    config = proxy_settings(**{"feddf.path": str(tmp_path), "data.proxy": 0.0})
    assert proxy_pixels(config).shape == (3, 1, 8, 8)


def test_parquet_files_of_other_classes_will_do(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three of CIFAR-10's, of ten classes."""
    decode = proxy.decode
    monkeypatch.setattr(proxy, "decode", lambda images, rows, *shape: decode(images, rows[:3], *shape))
    path = str(shared / "data" / "cifar10")
    pixels = proxy_pixels(proxy_settings(**{"feddf.path": path, "model.num-classes": 2}))
    assert pixels.shape == (3, 1, 32, 32)


def test_parquet_files_need_no_labels_either(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")
    pictures = {"picture": [buffer.getvalue()] * 3}
    config = proxy_settings(**{"feddf.path": str(tmp_path), "data.image-column": "of the training images"})
    pq.write_table(pa.table(pictures), tmp_path / "train.parquet")
    assert torch.equal(proxy_pixels(config).reshape(3, 64), torch.arange(64, dtype=torch.uint8).expand(3, 64))
    pq.write_table(pa.table({**pictures, "thumb": pictures["picture"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"several .* for feddf.path keep one .* columns: picture \(binary\), thumb"):
        proxy_pixels(config)


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    config = proxy_settings(**{"feddf.path": str(tmp_path)})
    with pytest.raises(DataError, match=f"feddf.path = '{tmp_path}': neither images nor train"):
        proxy_pixels(config)
    gone = Config.from_flat({"feddf.path": str(tmp_path / "none")}, config)
    with pytest.raises(DataError, match=r"there is no folder .*none"):
        feddf.check(gone)


@torch.no_grad()
def test_feddf_with_the_ensemble_already_followed_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 1: the student starts as the teacher, so the divergence and its gradient are 0."""
    monkeypatch.setattr(feddf, "student_stepper", lambda vit, _, steps: Sgd(vit, 0.01, steps))
    config = proxy_settings()
    (upload, _) = uploads_of(config)
    made = made_by(config, [upload])
    for name, tensor in upload.weights.items():
        torch.testing.assert_close(made.weights[name], tensor, rtol=0, atol=1e-5)


def test_feddf_comes_closer_to_the_ensemble(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []
    for passes, rate in ((1, 1e-12), (6, 3e-3)):
        monkeypatch.setattr(feddf, "PASSES", passes)
        config = proxy_settings(**{"distill.lr": rate, "data.train-limit": 600})
        fused(config, lines=lines)  # of two uploads that are unlike each other
    before, after = lines
    assert before["images"] == after["images"] == len(proxy_pixels(config))
    assert after["kd"] < 0.7 * before["kd"]


def test_feddf_never_sees_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    config = proxy_settings()
    uploads = uploads_of(config)
    made = made_by(config, uploads)
    pixels = proxy_pixels(config)
    monkeypatch.setattr(feddf, "proxy_pixels", lambda _: pixels)
    monkeypatch.setattr(Images, "__post_init__", lambda _: pytest.fail("labelled images were loaded"))
    again = made_by(config, uploads)
    assert same(again.weights, made.weights)


# --- all images in one place


def run_of(tmp_path: Path, **changes: Any) -> RunFolder:
    config = settings(**{"method": "fedavg", "out-dir": str(tmp_path)} | changes)
    return pipeline.run(config, "run")


def test_the_central_model_has_the_clients_settings_and_all_their_images(tmp_path: Path) -> None:
    run = run_of(tmp_path, **{"partition.scheme": "classes-per-client", "partition.min-size": 1})
    folder = train_centrally(run)
    config = run.config
    shares = [client_images(config, client)[0] for client in range(2)]
    images = Images(torch.cat([share.pixels for share in shares]), torch.cat([share.labels for share in shares]))
    assert len(images) < 60  # two clients of two classes do not have all
    vit = build_vit(config.model)
    vit.load_state_dict(initial_weights(config.model, config.seed))
    train_local(vit, images, config, stream(config.seed, "central"), CPU)
    made = load_tensors(folder.model_path)[0]
    assert all(torch.equal(made[name], tensor) for name, tensor in vit.state_dict().items())
    result = folder.read_result()
    assert folder.path == run.path / "fused" / "central-1"
    assert (result["method"], result["bytes_up"]) == ("central", [])
    assert 0 <= result["accuracy"]["student"] <= 100
    assert result["accuracy"]["fedavg"] is None
    assert result["evaluated_on"] == run.read_result()["evaluated_on"]
    assert sum(map(sum, result["confusion"])) == 30


def test_a_central_model_in_a_folder_has_the_settings_of_that_folder(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    folder = train_centrally(run, run.sub("other", Config.from_flat({"krum.hostile": 7}, run.config)))
    with_own = train_centrally(run, run.sub("longer", Config.from_flat({"local.epochs": 2}, run.config)))
    first, longer = (load_tensors(each.model_path)[0]["head.weight"] for each in (folder, with_own))
    assert torch.equal(first, load_tensors(train_centrally(run).model_path)[0]["head.weight"])
    assert not torch.equal(first, longer)


def test_the_central_line_is_shown_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path)
    assert main(["central", str(run.path)]) == 0
    assert "central (student)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"partition.scheme": "own", "data.train-limit": 0}, "clients' images are not here"),
        ({"evaluate.where": "clients"}, "judged by the server"),
    ],
)
def test_where_there_is_no_central_model(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    config = settings(**{"out-dir": str(tmp_path)} | changes)
    with pytest.raises(ConfigError, match=told):
        train_centrally(RunFolder.create(config, "run"))
    assert not (tmp_path / "run" / "fused").exists()
