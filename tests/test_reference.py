"""Reference lines: heads on frozen features, FedDF's real images, and all images in one place."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny import CPU, Sgd, fused, same, settings, small, some_images

from fedmitr_flwr import pipeline
from fedmitr_flwr.central import everybodys, train_centrally
from fedmitr_flwr.cli import main
from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.errors import ConfigError, DataError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import Images, prepare
from fedmitr_flwr.data.proxy import proxy_pixels
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.methods import feddf
from fedmitr_flwr.methods.contract import Fused
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.statistics import heads
from fedmitr_flwr.statistics.moments import frozen_features
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import build_vit, initial_weights, vit_of
from fedmitr_flwr.vit.taps import network_of


def with_statistics(**changes: Any) -> Config:
    return settings(**{"upload.extras": "variances"} | changes)


@cache
def uploads_of(extras: str = "variances") -> list[Upload]:
    """Of two clients that trained; all other settings that differ between tests are the server's."""
    config = settings(**{"upload.extras": extras})
    initial = initial_weights(config.model, config.seed)
    with torch.enable_grad():
        return [pipeline.train_client(config, client, initial) for client in range(2)]


@torch.enable_grad()
def made_by(config: Config, extras: str = "variances") -> Fused:
    return fused(config, uploads_of(extras))


def all_images(config: Config) -> Images:
    return everybodys([client_images(config, client)[0] for client in range(2)])


@torch.no_grad()
def test_lda_is_scikit_learns_on_all_clients_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "oas", lambda _: 0.2)
    config = with_statistics(method="lda")
    images, fresh = all_images(config), client_images(settings(**{"data.train-limit": 100}), 0)[0]
    start = vit_of(config.model, initial_weights(config.model, config.seed))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2)
    theirs.fit(frozen_features(start, images, small(), CPU).numpy(), images.labels.numpy())
    wanted = theirs.decision_function(frozen_features(start, fresh, small(), CPU).numpy())
    given = made_by(config).predict(prepare(fresh.pixels, config.model)).numpy()
    np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lda", "ridge", "fedpft"])
def test_a_head_on_the_public_start_is_one_model_that_can_be_saved(method: str) -> None:
    config = with_statistics(method=method)
    made, start = made_by(config), initial_weights(config.model, config.seed)
    own = {name.removeprefix("backbone."): tensor for name, tensor in made.weights.items()}
    changed = {name for name, tensor in start.items() if not torch.equal(own[name], tensor)}
    assert changed == {"head.weight", "head.bias"}
    images = some_images(config, 4)
    assert torch.equal(network_of(config.model, made.weights)(images), made.predict(images))
    assert same(made_by(config).weights, made.weights)


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
    assert len(proxies | validation | train) == len(proxies) + len(validation) + len(train) == 1437
    assert len(proxies) == pytest.approx(144, abs=5)  # 0.1 of each class, rounded
    assert len(validation) == pytest.approx(287, abs=5)
    before = load(settings(**whole).data, config.model)
    assert torch.equal(before.test.pixels, others.test.pixels)  # the same images judge, with or without proxies
    assert len(before.train) == 1437 - len(validation)


def test_what_is_no_proxy_is_refused_by_name_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.proxy = 0.0001 sets no image of any class aside; raise it"):
        proxy_pixels(proxy_settings(**{"data.proxy": 0.0001}))
    feddf.check(proxy_settings())
    with pytest.raises(DataError, match=f"feddf.path = '{tmp_path}': neither images nor train"):
        proxy_pixels(proxy_settings(**{"feddf.path": str(tmp_path)}))
    with pytest.raises(DataError, match=r"there is no folder .*none"):
        feddf.check(proxy_settings(**{"feddf.path": str(tmp_path / "none")}))


def test_images_need_no_labels(tmp_path: Path) -> None:
    """Neither in folders nor in Parquet files, which may have those of other classes."""
    folder, own = tmp_path / "images", {"data.proxy": 0.0, "model.num-classes": 2}
    for number, name in enumerate(("", "deep", "deep/er")):
        (folder / name).mkdir()
        Image.new("L", (8, 8), number).save(folder / name / f"{number}.png")
    assert sorted(proxy_pixels(proxy_settings(**own, **{"feddf.path": str(folder)}))[:, 0, 0, 0].tolist()) == [0, 1, 2]
    pictures = {"picture": [(folder / "deep" / "1.png").read_bytes()] * 3}
    own |= {"feddf.path": str(tmp_path / "tables"), "data.image-column": "of the training images"}
    (tmp_path / "tables").mkdir()
    for more in ({}, {"label": [7, 8, 9]}):
        pq.write_table(pa.table(pictures | more), tmp_path / "tables" / "train.parquet")
        assert torch.equal(proxy_pixels(proxy_settings(**own)), torch.ones(3, 1, 8, 8, dtype=torch.uint8))
    pq.write_table(pa.table({**pictures, "thumb": pictures["picture"]}), tmp_path / "tables" / "train.parquet")
    with pytest.raises(DataError, match=r"several .* for feddf.path keep one .* columns: picture \(binary\), thumb"):
        proxy_pixels(proxy_settings(**own))


def test_feddf_with_the_ensemble_already_followed_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 1: the student starts as the teacher, so the divergence and its gradient are 0."""
    monkeypatch.setattr(feddf, "student_stepper", lambda vit, _, steps: Sgd(vit, 0.01, steps))
    upload, _ = uploads_of("")
    made = fused(proxy_settings(), [upload])
    torch.testing.assert_close(made.weights, upload.weights, rtol=0, atol=1e-5)


def test_feddf_comes_closer_to_the_ensemble(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []
    for passes, rate in ((1, 1e-12), (6, 3e-3)):
        monkeypatch.setattr(feddf, "PASSES", passes)
        fused(proxy_settings(**{"distill.lr": rate}), lines=lines)  # of two unlike uploads
    before, after = lines
    assert before["images"] == after["images"] == len(proxy_pixels(proxy_settings()))
    assert after["kd"] < 0.7 * before["kd"]


def test_feddf_never_sees_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    made, pixels = made_by(proxy_settings(), ""), proxy_pixels(proxy_settings())
    monkeypatch.setattr(feddf, "proxy_pixels", lambda _: pixels)
    monkeypatch.setattr(Images, "__post_init__", lambda _: pytest.fail("labelled images were loaded"))
    assert same(made_by(proxy_settings(), "").weights, made.weights)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two clients of two classes each; models are added to it."""
    own = {"partition.scheme": "classes-per-client", "partition.min-size": 1, "method": "fedavg"}
    return pipeline.run(settings(**own, **{"out-dir": str(tmp_path_factory.mktemp("run"))}), "run")


def test_the_central_model_has_the_clients_settings_and_all_their_images(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["central", str(run.path)]) == 0
    assert "central (student)" in capsys.readouterr().out
    config, images = run.config, all_images(run.config)
    assert len(images) < 60  # two clients of two classes do not have all
    vit = build_vit(config.model)
    vit.load_state_dict(initial_weights(config.model, config.seed))
    train_local(vit, images, config, stream(config.seed, "central"), CPU)
    folder = run.path / "fused" / "central-1"
    assert same(load_tensors(folder / "model.safetensors")[0], vit.state_dict())
    result = RunFolder.open(folder).read_result()
    assert (result["method"], result["bytes_up"]) == ("central", [])
    assert 0 <= result["accuracy"]["student"] <= 100
    assert result["accuracy"]["fedavg"] is None
    assert result["evaluated_on"] == run.read_result()["evaluated_on"]
    assert sum(map(sum, result["confusion"])) == 30


def test_a_central_model_in_a_folder_has_the_settings_of_that_folder(run: RunFolder) -> None:
    folders = [
        train_centrally(run, run.sub("other", Config.from_flat(change, run.config)))
        for change in ({"krum.hostile": 7}, {"local.epochs": 2})
    ]
    plain, other, longer = (load_tensors(each.model_path)[0] for each in (train_centrally(run), *folders))
    assert same(plain, other)
    assert not same(plain, longer)


def test_where_there_is_no_central_model(tmp_path: Path) -> None:
    for changes, told in (
        ({"partition.scheme": "own", "data.train-limit": 0}, "clients' images are not here"),
        ({"evaluate.where": "clients"}, "judged by the server"),
    ):
        run = RunFolder.create(settings(**{"out-dir": str(tmp_path)} | changes), "run", or_next=True)
        with pytest.raises(ConfigError, match=told):
            train_centrally(run)
        assert not (run.path / "fused").exists()
