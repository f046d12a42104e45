"""Uploads and their statistics: what may enter the ensemble, what comes back from disk and over Flower."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_grid import TINY, Federate, LocalGrid, of_two, server_context
from safetensors.torch import save_file
from tiny import same
from torch import Tensor

from client_app.app import app as client_app
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import ConfigError, RunError, UploadError
from fedmitr_flwr.common.files import save_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.statistics import moments
from fedmitr_flwr.uploads.stored import StoredWeights
from fedmitr_flwr.uploads.upload import Upload, digest, load, save, size, validate
from fedmitr_flwr.vit.build import initial_weights, vit_of
from server_app.app import app as server_app

Log = pytest.LogCaptureFixture
CODE = "0123456789ab"
CLIENTS, MOST = 4, 1000
CONFIG = Config.from_flat({"model.num-classes": 3, "partition.clients": CLIENTS, "screen.max-images": MOST})
REFERENCE = {
    "cls_token": torch.zeros(1, 1, 4),
    "head.weight": torch.zeros(3, 4),
    "head.bias": torch.zeros(3),
    "steps": torch.tensor(0),  # integer and without axes, as batch counters are
}
FLOATING = [key for key, tensor in REFERENCE.items() if tensor.is_floating_point()]
FAST = {"ensemble.weights": "size", "screen.mode": "off"}
patterns = st.lists(st.integers(-(2**31), 2**31 - 1)).map(lambda bits: torch.tensor(bits, dtype=torch.int32))
names = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: name != "__metadata__")
tensors = st.dictionaries(names, patterns.map(lambda bits: bits.view(torch.float32)))
losses = st.floats(allow_nan=False, allow_infinity=False)
counts = st.none() | st.lists(st.integers(0)).map(tuple)
uploads = st.builds(Upload, st.integers(0, 999), tensors, st.integers(1), losses, st.just(CODE), counts)


def an_upload(client: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Upload:
    rng = torch.Generator().manual_seed(seed)
    weights = {key: torch.randn(REFERENCE[key].shape, generator=rng).to(dtype) for key in FLOATING}
    return Upload(client, weights | {"steps": torch.tensor(7)}, 12, 0.5, CODE, (3, 0, 9))


def with_statistics(variances: bool = False) -> Upload:
    features = torch.randn(12, 16, generator=stream(0))  # as many numbers as taps of `REFERENCE`
    labels = torch.tensor([0] * 3 + [2] * 9)
    told = moments.measure(features, labels, 3, variances=variances)
    return replace(an_upload(), statistics=moments.sent(told))


def altered(upload: Upload, of: str = "weights", **tensors: Tensor) -> Upload:
    return replace(upload, **{of: getattr(upload, of) | tensors})


def check(upload: Upload, extras: str = "") -> None:
    validate(upload, REFERENCE, Config.from_flat({"upload.extras": extras}, CONFIG), CODE)


def without(upload: Upload, name: str) -> Upload:
    return replace(upload, weights={key: tensor for key, tensor in upload.weights.items() if key != name})


def mutants(good: Upload) -> Iterator[tuple[Upload, str]]:
    """With a word that the refusal must hold."""
    for key in FLOATING:
        tensor = good.weights[key]
        for other in (tensor[..., :-1], tensor[None], tensor.bfloat16(), tensor.double(), tensor.long()):
            yield altered(good, **{key: other}), key
        yield without(good, key), key
        yield altered(good, **{f"{key}.x": torch.ones(1)}), f"{key}.x"
    overflowed = (good.weights["head.bias"].float() + 1e6).half()
    yield altered(good, **{"head.bias": overflowed}), "infinity in 'head.bias'"
    yield from ((altered(good, steps=other), "steps") for other in (torch.tensor(7.0), torch.tensor(7).int()))
    yield replace(good, weights={}), "lack 'cls_token', 'head.weight', 'head.bias' and 1 more"
    for name, values, named in (
        ("fingerprint", ("", CODE[::-1]), "other code"),
        ("train_loss", (math.nan, math.inf), "training loss"),
        ("seconds", (math.nan, -1.0), "took {} seconds"),
        ("class_counts", ((3, 9), (3, 0, 9, 0), (), (13, -1, 0), (3, 0, 8)), "class counts"),
        ("num_examples", (10**12, MOST + 1), "screen.max-images is 1000"),
    ):
        yield from ((replace(good, **{name: value}), named.format(value)) for value in values)


def assert_refused(mutant: Upload, named: str) -> None:
    """In one line that names the client and the thing."""
    with pytest.raises(UploadError) as caught:
        check(mutant)
    assert re.fullmatch(f"client {mutant.client}: .*{re.escape(named)}.*", str(caught.value))


def test_a_good_upload_passes_and_each_mutation_is_refused() -> None:
    """Precision may be mixed, but nothing may have overflowed: float16 ends at 65504."""
    for client, dtype in zip(range(CLIENTS), (torch.float32, torch.float16) * 2, strict=True):
        good = an_upload(client, dtype)
        check(good)
        check(replace(good, class_counts=None))
        check(altered(good, **{"head.bias": good.weights["head.bias"].half()}))
        for mutant, named in mutants(good):
            assert_refused(mutant, named)


@given(st.data(), st.sampled_from(FLOATING), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_any_broken_number_is_refused(data: st.DataObject, key: str, value: float) -> None:
    good = an_upload(dtype=data.draw(st.sampled_from([torch.float32, torch.float16])))
    place = torch.tensor(data.draw(st.integers(0, good.weights[key].numel() - 1)))
    broken = good.weights[key].flatten().index_fill(0, place, value).view_as(good.weights[key])
    assert_refused(altered(good, **{key: broken}), f"infinity in '{key}'")
    images = data.draw(st.integers(max_value=0))
    assert_refused(replace(good, num_examples=images), f"on {images} images")
    client = data.draw(st.integers(max_value=-1) | st.integers(min_value=CLIENTS))
    assert_refused(replace(good, client=client), "clients 0 to 3")


@given(uploads)
def test_every_bit_pattern_of_float32_comes_back(tmp_path_factory: pytest.TempPathFactory, sent: Upload) -> None:
    path = tmp_path_factory.getbasetemp() / "client_000.safetensors"
    save(sent, path)
    got = load(path)
    assert same(*({name: bits.view(torch.int32) for name, bits in each.weights.items()} for each in (got, sent)))
    for name in ("client", "num_examples", "train_loss", "fingerprint", "class_counts", "num_bytes"):
        assert getattr(got, name) == getattr(sent, name), name


def test_every_type_of_tensor_comes_back(tmp_path: Path) -> None:
    """Every finite float16 as the same number in float32; views of one storage and parameters, too."""
    every, storage = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16), torch.arange(6.0)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    weights = {str(kind): torch.tensor([[0, 1], [1, 1]]).to(kind) for kind in whole} | {"none": torch.ones(0, 3)}
    weights |= {"a": storage[:4].view(2, 2).T, "b": storage[2:], "c": torch.nn.Parameter(storage)}
    floats = {str(kind): torch.tensor([0.5, -3.0]).to(kind) for kind in (torch.float64, torch.bfloat16)}
    floats |= {"float16": every[torch.isfinite(every)]}
    sent = replace(an_upload(), weights=weights | floats)
    save(sent, tmp_path / "u")
    got = load(tmp_path / "u")
    assert got.num_bytes == sent.num_bytes  # not what the cast made of it
    for name, tensor in (weights | {name: tensor.float() for name, tensor in floats.items()}).items():
        assert got.weights[name].dtype == tensor.dtype
        assert torch.equal(got.weights[name], tensor)
    assert not got.weights["c"].requires_grad
    got.weights["b"].zero_()  # what was read is the reader's own
    assert [got.weights[name].tolist() for name in "ab"] == [[[0, 2], [1, 3]], [2, 3, 4, 5]]


def test_weights_on_disk_are_read_one_by_one_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = StoredWeights.__getitem__
    monkeypatch.setattr(StoredWeights, "__getitem__", lambda own, name: (read.append(name), get(own, name))[1])
    sent = an_upload(dtype=torch.float16)
    save(sent, tmp_path / "u")
    got = load(tmp_path / "u")
    assert got.num_bytes == sent.num_bytes == 19 * 2 + 8  # 4 + 12 + 3 floats of 2 bytes and one int64
    assert got.weights.keys() == REFERENCE.keys()
    assert ["head.bias" in got.weights, "head.bios" in got.weights] == [True, False]
    assert read == []
    assert torch.equal(got.weights["head.bias"], sent.weights["head.bias"].float())
    assert read == ["head.bias"]
    with pytest.raises(KeyError):
        got.weights["head.bios"]
    whole = dict(got.weights)
    assert [whole[key].dtype for key in REFERENCE] == [tensor.dtype for tensor in REFERENCE.values()]
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
    save_tensors(tmp_path / "pool", {"x": torch.ones(1)}, {"what": "a pool"})
    save_file({"x": torch.ones(1)}, tmp_path / "foreign")
    for problem in ("none does not exist", "pool is not an upload", "foreign was not written by fedmitr"):
        with pytest.raises(RunError, match=problem):
            load(tmp_path / problem.split()[0])


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
    head = upload.weights["head.weight"]
    changed = [replace(upload, client=2), replace(upload, num_examples=11), replace(upload, class_counts=(0, 3, 9))]
    changed += [without(upload, "head.weight"), replace(upload, statistics=None), with_statistics()]
    changed += [altered(upload, **{"head.weight": other}) for other in (head.T.contiguous(), head * 2)]
    changed += [altered(upload, "statistics", **{name: sums * (1 + 1e-6)}) for name, sums in upload.statistics.items()]
    assert len({digest(each) for each in [upload, *changed]}) == 1 + len(changed)


def test_statistics_come_back_from_disk_bit_by_bit(tmp_path: Path) -> None:
    sent = replace(with_statistics(variances=True), weights={"w": torch.tensor([1.5], dtype=torch.float16)})
    save(sent, tmp_path / "u")
    got = load(tmp_path / "u")
    assert same(got.statistics, sent.statistics)
    assert {tensor.dtype for tensor in got.statistics.values()} == {torch.float32}
    assert {name: (w.dtype, w.tolist()) for name, w in got.weights.items()} == {"w": (torch.float32, [1.5])}
    assert got.num_bytes == sent.num_bytes == 2 + 4 * (48 + 136 + 48)
    save(Upload(0, {"statistics/x": torch.ones(1)}, 1, 0.5, CODE), tmp_path / "v")
    assert load(tmp_path / "v").weights.keys() == {"statistics/x"}  # its own name, unless there are statistics
    assert load(tmp_path / "v").statistics is None


def test_what_was_asked_for_passes_and_what_is_corrupt_is_refused_by_name() -> None:
    sound, asked = with_statistics(), "statistics"
    sums = sound.statistics["sums"]
    check(sound, asked)
    check(with_statistics(variances=True), "variances")
    check(replace(sound, statistics=None), "")
    for upload, extras, told in (
        (sound, "", r"its statistics are \['moment', 'sums'\], not \[\]"),
        (replace(sound, statistics=None), asked, r"are \[\], not \['moment', 'sums'\] \(upload.extras"),
        (replace(sound, statistics={"sums": sums}), asked, r"are \['sums'\], not"),
        (altered(sound, asked, sums=sums + 50), asked, "are no sums of features: .* has a sum"),
        (replace(sound, class_counts=(11, 0, 1)), asked, "are no sums of features: .*negative eigenvalue"),
        (replace(sound, class_counts=None), asked, "statistics without class counts"),
    ):
        with pytest.raises(UploadError, match=f"^client 1: .*{told}"):
            check(upload, extras)


def test_a_client_tells_the_sums_of_its_own_unaugmented_images_before_training() -> None:
    """And they change nothing else in an upload."""
    config = of_two(**{"upload.extras": "variances", "upload.dtype": "float16"})
    initial = initial_weights(config.model, config.seed)
    upload = pipeline.train_client(config, 1, initial)
    images = client_images(config, 1)[0]
    features = moments.frozen_features(vit_of(config.model, initial), images, config.model, torch.device("cpu"))
    assert tuple(upload.statistics) == moments.names(config.upload) == ("sums", "moment", "squares")
    assert same(upload.statistics, moments.sent(moments.measure(features, images.labels, 10, variances=True)))
    assert upload.class_counts == tuple(torch.bincount(images.labels, minlength=10).tolist())
    without = pipeline.train_client(of_two(**{"upload.extras": "", "upload.dtype": "float16"}), 1, initial)
    assert (without.statistics, without.class_counts) == (None, None)
    assert upload.train_loss == without.train_loss
    assert same(upload.weights, without.weights)


def test_room_is_asked_for_with_directions(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that has room for three models and not for more."""
    free = 3 * size(initial_weights(of_two().model, 0))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert federate(LocalGrid(client_app, 3), **FAST).finished
    more = FAST | {"upload.extras": "moments"}
    federate(LocalGrid(client_app, 3), "and 3 uploads take .* MB; make room there", **more)


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
