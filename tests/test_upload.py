"""Uploads and their statistics: what may enter the ensemble, what comes back from disk and over Flower."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message
from hypothesis import given
from hypothesis import strategies as st
from local_grid import TINY, Federate, LocalGrid, server_context
from safetensors.torch import save_file
from tiny import same
from torch import Tensor

from client_app.app import app as client_app
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import ConfigError, RunError, UploadError
from fedmitr_flwr.common.files import load_tensors, save_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.statistics import moments
from fedmitr_flwr.uploads.stored import StoredWeights
from fedmitr_flwr.uploads.upload import Upload, digest, load, save, size, validate
from fedmitr_flwr.vit.build import build_vit, initial_weights
from server_app.app import app as server_app

CODE = "0123456789ab"
CLIENTS, MOST = 4, 1000
CONFIG = Config.from_flat({"model.num-classes": 3, "partition.clients": CLIENTS, "screen.max-images": MOST})
REFERENCE = {
    "cls_token": torch.zeros(1, 1, 4),
    "head.weight": torch.zeros(3, 4),
    "head.bias": torch.zeros(3),
    "steps": torch.tensor(0),  # integer and without axes, as batch counters are
}


def an_upload(client: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Upload:
    rng = torch.Generator().manual_seed(seed)
    weights = {
        key: torch.randn(wanted.shape, generator=rng).to(dtype) if wanted.is_floating_point() else wanted + 7
        for key, wanted in REFERENCE.items()
    }
    return Upload(client, weights, 12, 0.5, CODE, (3, 0, 9))


def with_statistics(variances: bool = False) -> Upload:
    features = torch.randn(12, 4, generator=stream(0))
    labels = torch.tensor([0] * 3 + [2] * 9)
    return replace(an_upload(), statistics=moments.measure(features, labels, 3, variances=variances))


def telling(upload: Upload, **sums: Tensor) -> Upload:
    return replace(upload, statistics={**upload.statistics, **sums})


def check(upload: Upload, extras: str = "") -> None:
    validate(upload, REFERENCE, Config.from_flat({"upload.extras": extras}, CONFIG), CODE)


def weighing(upload: Upload, **weights: Tensor) -> Upload:
    return replace(upload, weights=upload.weights | weights)


def without(upload: Upload, name: str) -> Upload:
    return replace(upload, weights={key: tensor for key, tensor in upload.weights.items() if key != name})


FLOATING = [key for key, tensor in REFERENCE.items() if tensor.is_floating_point()]


def mutants(good: Upload) -> Iterator[tuple[Upload, str]]:
    """With a word that the refusal must hold."""
    for key in FLOATING:
        tensor = good.weights[key]
        for other in (tensor[..., :-1], tensor[None], tensor.bfloat16(), tensor.double(), tensor.long()):
            yield weighing(good, **{key: other}), key
        yield without(good, key), key
        yield weighing(good, **{f"{key}.x": torch.ones(1)}), f"{key}.x"
    overflowed = (good.weights["head.bias"].float() + 1e6).half()
    yield weighing(good, **{"head.bias": overflowed}), "infinity in 'head.bias'"
    yield weighing(good, steps=good.weights["steps"].float()), "steps"
    yield weighing(good, steps=good.weights["steps"].int()), "steps"
    yield replace(good, weights={}), "lack 'cls_token', 'head.weight', 'head.bias' and 1 more"
    for other in ("", CODE[::-1]):
        yield replace(good, fingerprint=other), "other code"
    for other in (math.nan, math.inf):
        yield replace(good, train_loss=other), "training loss"
    for other in (math.nan, -1.0):
        yield replace(good, seconds=other), f"took {other} seconds"
    for other in (10**12, MOST + 1):
        yield replace(good, num_examples=other, class_counts=None), "screen.max-images is 1000"
    for other in ((3, 9), (3, 0, 9, 0), (), (13, -1, 0), (3, 0, 8)):
        yield replace(good, class_counts=other), "class counts"


def assert_refused(mutant: Upload, named: str) -> None:
    """In one line that names the client and the thing."""
    with pytest.raises(UploadError) as caught:
        check(mutant)
    assert re.fullmatch(f"client {mutant.client}: .*{re.escape(named)}.*", str(caught.value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_good_upload_passes_and_each_mutation_is_refused(dtype: torch.dtype) -> None:
    """Precision may be mixed, but nothing may have overflowed: float16 ends at 65504."""
    for client in range(CLIENTS):
        good = an_upload(client, dtype)
        check(good)
        check(replace(good, class_counts=None))
        check(weighing(good, **{"head.bias": good.weights["head.bias"].half()}))
        for mutant, named in mutants(good):
            assert_refused(mutant, named)


@given(st.data(), st.sampled_from(FLOATING), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_any_broken_number_is_refused(data: st.DataObject, key: str, value: float) -> None:
    good = an_upload(dtype=data.draw(st.sampled_from([torch.float32, torch.float16])))
    place = torch.tensor(data.draw(st.integers(0, good.weights[key].numel() - 1)))
    broken = good.weights[key].flatten().index_fill(0, place, value).view_as(good.weights[key])
    assert_refused(weighing(good, **{key: broken}), f"infinity in '{key}'")
    images = data.draw(st.integers(max_value=0))
    assert_refused(replace(good, num_examples=images), f"on {images} images")
    client = data.draw(st.integers(max_value=-1) | st.integers(min_value=CLIENTS))
    assert_refused(replace(good, client=client), "clients 0 to 3")


patterns = st.lists(st.integers(-(2**31), 2**31 - 1)).map(lambda bits: torch.tensor(bits, dtype=torch.int32))
names = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: name != "__metadata__")
uploads = st.builds(
    Upload,
    client=st.integers(0, 999),
    weights=st.dictionaries(names, patterns.map(lambda bits: bits.view(torch.float32))),
    num_examples=st.integers(1),
    train_loss=st.floats(allow_nan=False, allow_infinity=False),
    fingerprint=st.just(CODE),
    class_counts=st.none() | st.lists(st.integers(0)).map(tuple),
)


@given(uploads)
def test_float32_round_trip_is_exact_for_every_bit_pattern(
    tmp_path_factory: pytest.TempPathFactory, sent: Upload
) -> None:
    path = tmp_path_factory.getbasetemp() / "client_000.safetensors"
    save(sent, path)
    got = load(path)
    assert got.weights.keys() == sent.weights.keys()
    for name, tensor in sent.weights.items():
        assert torch.equal(got.weights[name].view(torch.int32), tensor.view(torch.int32))
    for name in ("client", "num_examples", "train_loss", "fingerprint", "class_counts", "num_bytes"):
        assert getattr(got, name) == getattr(sent, name), name


def test_every_type_of_tensor_comes_back(tmp_path: Path) -> None:
    """Every finite float16 as the same number in float32."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    weights = {str(kind): torch.tensor([[0, 1], [1, 1]]).to(kind) for kind in whole} | {"none": torch.ones(0, 3)}
    floats = {str(kind): torch.tensor([0.5, -3.0]).to(kind) for kind in (torch.float64, torch.bfloat16)}
    floats |= {"float16": every[torch.isfinite(every)]}
    sent = replace(an_upload(), weights=weights | floats)
    save(sent, tmp_path / "u")
    got = load(tmp_path / "u")
    assert got.num_bytes == sent.num_bytes  # not what the cast made of it
    for name, tensor in (weights | {name: tensor.float() for name, tensor in floats.items()}).items():
        assert got.weights[name].dtype == tensor.dtype
        assert torch.equal(got.weights[name], tensor)


def test_views_of_one_storage_and_parameters_are_written_too(tmp_path: Path) -> None:
    storage = torch.arange(6.0)
    weights = {"a": storage[:4].view(2, 2).T, "b": storage[2:], "c": torch.nn.Parameter(storage)}
    save(replace(an_upload(), weights=weights), tmp_path / "u")
    got = load(tmp_path / "u").weights
    assert got["a"].tolist() == [[0, 2], [1, 3]]
    assert got["b"].tolist() == [2, 3, 4, 5]
    assert not got["c"].requires_grad
    got["b"].zero_()  # what was read is the reader's own
    assert got["b"].tolist() == [2, 3, 4, 5]


def test_weights_on_disk_are_read_one_by_one_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = StoredWeights.__getitem__
    monkeypatch.setattr(StoredWeights, "__getitem__", lambda own, name: (read.append(name), get(own, name))[1])
    sent = an_upload(dtype=torch.float16)
    save(sent, tmp_path / "u")
    got = load(tmp_path / "u")
    assert got.num_bytes == sent.num_bytes == 19 * 2 + 8  # 4 + 12 + 3 floats of 2 bytes and one int64
    assert got.weights.keys() == REFERENCE.keys()
    assert len(got.weights) == len(REFERENCE)
    assert ["head.bias" in got.weights, "head.bios" in got.weights] == [True, False]
    assert read == []
    assert torch.equal(got.weights["head.bias"], sent.weights["head.bias"].float())
    assert read == ["head.bias"]
    with pytest.raises(KeyError):
        got.weights["head.bios"]
    assert {key: tensor.dtype for key, tensor in got.weights.items()} == {
        key: REFERENCE[key].dtype for key in REFERENCE
    }
    assert sorted(read[2:]) == sorted(REFERENCE)


def replaced(path: Path) -> None:
    """By another client's whole file of the same size and age."""
    before, other = path.stat(), path.with_name("other")
    save(an_upload(seed=1), other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_size == before.st_size


def test_a_file_that_changes_while_it_is_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "client_001.safetensors"
    for change, problem in (
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), f"{path} was changed while"),
        (replaced, f"{path} was changed while"),
        (Path.unlink, f"cannot read {path}"),
    ):
        save(an_upload(), path)
        weights = load(path).weights
        weights["head.bias"]
        change(path)
        for use in (lambda weights: weights["head.bias"], dict):
            with pytest.raises(RunError, match=f"{problem}.*; set resume-from to its run folder to go on$"):
                use(weights)


def test_cut_and_other_files_are_no_uploads(tmp_path: Path) -> None:
    path = tmp_path / "client_001.safetensors"
    save(an_upload(), path)
    whole = path.read_bytes()
    for keep in (0, 4, 100, -1):
        path.write_bytes(whole[:keep])
        with pytest.raises(RunError, match=r"client_001\.safetensors is corrupt.*resume-from"):
            load(path)
    with pytest.raises(RunError, match="does not exist"):
        load(tmp_path / "none")
    save_tensors(tmp_path / "pool", {"x": torch.ones(1)}, {"what": "a pool"})
    with pytest.raises(RunError, match="pool is not an upload"):
        load(tmp_path / "pool")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(RunError, match="foreign was not written by fedmitr"):
        load(tmp_path / "foreign")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "u.safetensors"
    save(an_upload(), path)
    before = path.read_bytes()
    save(an_upload(), path)
    assert path.read_bytes() == before  # equal uploads make equal files
    request.getfixturevalue("full_disk")
    with pytest.raises(RunError, match=r"cannot write .*u\.safetensors.*No space left"):
        save(an_upload(seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_sees_everything_that_the_server_uses(tmp_path: Path) -> None:
    upload = with_statistics(variances=True)
    save(upload, tmp_path / "u")
    assert digest(load(tmp_path / "u")) == digest(with_statistics(variances=True)) == digest(upload)
    assert digest(replace(upload, train_loss=9.0, fingerprint="x")) == digest(upload)
    changed = [replace(upload, **{name: value}) for name, value in {"client": 2, "num_examples": 11}.items()]
    changed += [replace(upload, class_counts=(0, 3, 9)), without(upload, "head.weight")]
    head = upload.weights["head.weight"]
    changed += [weighing(upload, **{"head.weight": other}) for other in (head.T.contiguous(), head * 2)]
    changed += [telling(upload, **{name: tensor * (1 + 1e-15)}) for name, tensor in upload.statistics.items()]
    changed += [replace(upload, statistics=None), with_statistics()]
    assert len({digest(each) for each in [upload, *changed]}) == 1 + len(changed)


def test_statistics_come_back_from_disk_bit_by_bit(tmp_path: Path) -> None:
    sent = replace(with_statistics(variances=True), weights={"w": torch.tensor([1.5], dtype=torch.float16)})
    save(sent, tmp_path / "u")
    got = load(tmp_path / "u")
    assert same(got.statistics, sent.statistics)
    assert {tensor.dtype for tensor in got.statistics.values()} == {torch.float64}
    assert got.weights.keys() == {"w"}
    assert (got.weights["w"].dtype, got.weights["w"].tolist()) == (torch.float32, [1.5])
    assert digest(got) == digest(replace(sent, weights={"w": torch.tensor([1.5])}))
    assert got.num_bytes == sent.num_bytes == 2 + 8 * (12 + 10 + 12)
    # A name of this form is a weight's own, unless there are statistics.
    save(Upload(0, {"statistics/x": torch.ones(1)}, 1, 0.5, CODE), tmp_path / "v")
    assert load(tmp_path / "v").weights.keys() == {"statistics/x"}
    assert load(tmp_path / "v").statistics is None


def test_what_was_asked_for_passes_and_what_is_corrupt_is_refused_by_name() -> None:
    sound = with_statistics()
    check(sound, "statistics")
    check(with_statistics(variances=True), "variances")
    check(replace(sound, statistics=None), "")
    for upload, told in (
        (replace(sound, statistics=None), r"are \[\], not \['moment', 'sums'\] \(upload.extras"),
        (replace(sound, statistics={"sums": sound.statistics["sums"]}), r"are \['sums'\], not"),
        (telling(sound, sums=sound.statistics["sums"] + 50), "are no sums of features: .* has a sum"),
        (replace(sound, class_counts=(11, 0, 1)), "are no sums of features: .*negative eigenvalue"),
        (replace(sound, class_counts=None), "statistics without class counts"),
    ):
        with pytest.raises(UploadError, match=f"^client 1: .*{told}"):
            check(upload, "statistics")
    with pytest.raises(UploadError, match=r"^client 1: its statistics are \['moment', 'sums'\], not \[\]"):
        check(sound, "")


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
    features = moments.frozen_features(vit, images, config.model, torch.device("cpu"))
    assert tuple(upload.statistics) == moments.names(config.upload) == ("sums", "moment", "squares")
    assert same(upload.statistics, moments.measure(features, images.labels, 10, variances=True))
    assert upload.class_counts == tuple(torch.bincount(images.labels, minlength=10).tolist())
    without = pipeline.train_client(settings(**{"upload.extras": "", "upload.dtype": "float16"}), 1, initial)
    assert (without.statistics, without.class_counts) == (None, None)
    assert upload.train_loss == without.train_loss
    assert same(upload.weights, without.weights)


FAST = {"ensemble.weights": "size", "screen.mode": "off"}
LDA = FAST | {"method": "lda", "upload.extras": "statistics"}


@pytest.mark.parametrize("asked", [LDA, FAST | {"method": "regmean", "upload.extras": "variances, moments"}])
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
    assert federate(LocalGrid(client_app, 3), **FAST).finished
    more = FAST | {"upload.extras": "moments"}
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
