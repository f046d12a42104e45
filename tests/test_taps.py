"""Taps of a ViT by hand, their public projection, sums over partitions, and the models that read them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny import a_vit, same, settings, some_images
from torch import Tensor

from fedmitr_flwr import pipeline
from fedmitr_flwr.api.run import Run
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config, ModelConfig, UploadConfig
from fedmitr_flwr.data.images import Images, prepare
from fedmitr_flwr.data.shares import server_images
from fedmitr_flwr.merging.closed_form import beside_student, pooled
from fedmitr_flwr.publish.hub import save_model
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.statistics.heads import UNSEEN, lda
from fedmitr_flwr.statistics.moments import Statistics, frozen_features, like, measure, sent, total
from fedmitr_flwr.uploads.gate import require_model, shapes
from fedmitr_flwr.vit.build import initial_weights
from fedmitr_flwr.vit.taps import FEATURES, count_taps, load_model, network_of, on_taps, projection, taps

TINY = settings()
CONFIG = settings(**{"model.width": 64, "model.depth": 5})  # more blocks and more taps than are read and sent
SENT = UploadConfig(extras="statistics")
WIDTH, CPU = 64, torch.device("cpu")
pytestmark = pytest.mark.usefixtures("_no_gradients")


@pytest.fixture
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def test_taps_by_hand() -> None:
    """Block by block: class token and mean patch of the last four of five, and four quarters of the third."""
    vit, images = a_vit(CONFIG, 0), some_images(CONFIG, 3)
    x, outputs = vit._pos_embed(vit.patch_embed(images)), []
    for block in vit.blocks:
        outputs.append(x := block(x))
    wanted = [part for x in map(normed, outputs[1:]) for part in (x[:, 0], x[:, 1:].mean(1))]
    grid = normed(outputs[2])[:, 1:].reshape(3, 4, 4, WIDTH)
    quarters = [grid[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) for i in (0, 1) for j in (0, 1)]
    wanted += list(torch.stack(quarters, 2).flatten(1).split(4 * WIDTH, 1))
    torch.testing.assert_close(taps(vit, images), torch.cat(wanted, 1), rtol=1e-4, atol=1e-4)
    assert count_taps(vit.state_dict()) == taps(vit, images).shape[1] == 12 * WIDTH
    shallow = settings(**{"model.depth": 1})
    assert taps(a_vit(shallow, 0), images).shape[1] == count_taps(shapes(shallow.model)) == 6 * 16


def test_the_projection_is_public_and_keeps_lengths() -> None:
    """Its signs are pinned: clients and servers of different machines must draw the same."""
    own = projection(768)
    assert own[0, :12].sign().tolist() == [1, 1, -1, 1, 1, 1, -1, 1, 1, -1, -1, 1]
    assert torch.equal(own.abs(), torch.full((768, FEATURES), 1 / math.sqrt(768), dtype=torch.float64))
    projection.cache_clear()
    torch.randn(9)
    assert torch.equal(projection(768), own)
    x = torch.randn(100, 768, generator=stream(1), dtype=torch.float64)
    power = (x @ own).square().mean(1) / x.square().mean(1)
    assert ((power - 1).abs() < 5 * math.sqrt(2 / FEATURES)).all()  # of a χ² of 512 degrees of freedom
    assert torch.equal(projection(512), torch.eye(512))


def some_labelled(count: int = 120, classes: int = 4) -> Images:
    rng = stream(3, "labelled")
    pixels = torch.randint(256, (count, 1, 8, 8), generator=rng).to(torch.uint8)
    return Images(pixels, torch.randint(classes, (count,), generator=rng))


def test_sums_over_clients_are_those_of_all_images_to_1e_8() -> None:
    """In float64: in float32 the network itself rounds otherwise in a batch of another size."""
    images, vit = some_labelled(), a_vit(CONFIG, 0).double()
    pixels = prepare(images.pixels, CONFIG.model).double()

    def of(rows: Tensor) -> Statistics:
        z, labels = taps(vit, pixels[rows]) @ projection(12 * WIDTH), images.labels[rows]
        return Statistics.of(measure(z, labels, 4), tuple(torch.bincount(labels, minlength=4).tolist()))

    pooled = of(torch.arange(120))
    for shares in (images.labels.argsort().chunk(7), torch.arange(120).split(1)):
        parts = total(of(share) for share in shares)
        for name in ("counts", "sums", "moment", "scatter"):
            ours, wanted = getattr(parts, name), getattr(pooled, name)
            assert (ours - wanted).norm() <= 1e-8 * wanted.norm(), name


@pytest.mark.parametrize(
    "model",
    [CONFIG.model, ModelConfig(name="deit_tiny_patch16_224", img_size=96, patch_size=16, in_chans=3, num_classes=10)],
)
def test_an_upload_of_sums_has_at_most_550_kb(model: ModelConfig) -> None:
    tensors = like(shapes(model), SENT)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == 4 * (512 * 513 // 2 + 5120)
    assert 4 * (512 * 513 // 2 + 5120) == 545_792
    real = sent(measure(torch.zeros(1, 512), torch.tensor([0]), 10))
    assert {name: (t.shape, t.dtype) for name, t in real.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }


def test_lda_on_taps_is_one_file_that_answers_as_scikit_learn(tmp_path: Path) -> None:
    """Saved, read by the project's loader, asked: the same bits as in memory, and scikit-learn's on the features."""
    vit, images = a_vit(CONFIG, 0), some_labelled(400)
    z = frozen_features(vit, images, CONFIG.model, CPU)
    counts = tuple(torch.bincount(images.labels, minlength=10).tolist())
    head = lda(Statistics.of(measure(z, images.labels, 10), counts), 0.3)
    weights = on_taps(vit.state_dict(), *head)
    require_model(weights, CONFIG.model, "")
    folder = RunFolder.create(Config.from_flat({"out-dir": str(tmp_path)}, base=CONFIG), "one")
    save_model(folder, weights, [])
    pixels = prepare(images.pixels[:20], CONFIG.model)
    given = load_model(folder.path)(pixels)
    assert torch.equal(given, network_of(CONFIG.model, weights)(pixels))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(z.numpy(), images.labels.numpy())
    np.testing.assert_allclose(given[:, :4], theirs.decision_function(z[:20].numpy()), rtol=1e-3, atol=1e-3)


def test_closed_form_and_student_are_added_by_hand(tmp_path: Path) -> None:
    """Each divided by the deviation of its scores over the classes that somebody has, the student's 0.05 of that.

    That of the closed form is on the very images that were summed, and so can be had of them.
    """
    start, images, pool = initial_weights(TINY.model, TINY.seed), some_labelled(), some_images(TINY, 30)
    pixels, student = prepare(images.pixels, TINY.model), dict(a_vit(TINY, 5).state_dict())
    z = frozen_features(network_of(TINY.model, start), images, TINY.model, CPU)
    counts = tuple(torch.bincount(images.labels, minlength=10).tolist())
    statistics = Statistics.of(measure(z, images.labels, 10), counts)
    asked = network_of(TINY.model, on_taps(start, *lda(statistics))), network_of(TINY.model, student)

    def scores(which: int, of: Tensor) -> np.ndarray:
        return asked[which](of)[:, :4].double().numpy()

    centred = [each - each.mean(1, keepdims=True) for each in (scores(0, pixels), scores(1, pool))]
    wanted = scores(0, pool) / centred[0].std() + 0.05 * scores(1, pool) / centred[1].std(ddof=1)
    weights = beside_student(student, statistics, pool, TINY, CPU)
    model = network_of(TINY.model, weights)
    np.testing.assert_allclose(model(pool)[:, :4].numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert (model(pool)[:, 4:] < UNSEEN / 2).all()  # nobody has these classes
    require_model(weights, TINY.model, "")
    folder = RunFolder.create(settings(**{"out-dir": str(tmp_path)}), "both")
    save_model(folder, weights, [])
    assert torch.equal(load_model(folder.path)(pool), model(pool))


@torch.enable_grad()
def test_statistics_change_no_bit_of_the_student_and_are_added_to_it(tmp_path: Path) -> None:
    run = pipeline.run(settings(**{"out-dir": str(tmp_path), "upload.extras": "statistics"}), "with")
    without = pipeline.fuse(run, "fedmitr", {"upload.extras": ""})
    plain, beside = (load_tensors(folder.model_path)[0] for folder in (without, run))
    student = {name.removeprefix("student."): w for name, w in beside.items() if name.startswith("student.")}
    assert {name for name in plain if not torch.equal(plain[name], student[name])} == {"head.weight", "head.bias"}
    pools = [load_tensors(folder.pool_path)[0] for folder in (without, run)]
    assert same(*pools)
    again = beside_student(plain, pooled(run.load_uploads()), pools[0]["images"], run.config, CPU)
    assert same(again, beside)
    one, other = (folder.read_result()["accuracy"] for folder in (without, run))
    assert (one["ensemble"], one["fedavg"], one["local"]) == (other["ensemble"], other["fedavg"], other["local"])
    test = server_images(run.config)[0]
    assert same(Run(run.path).model().state_dict(), beside)
    assert "load_model(Path" in (run.path / "README.md").read_text()
    with torch.no_grad():
        right = load_model(run.path)(prepare(test.pixels, run.config.model)).argmax(1) == test.labels
    assert other["student"] == pytest.approx(100 * right.double().mean().item(), abs=0.01)
