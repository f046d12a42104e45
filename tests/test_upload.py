"""Uploads: what may enter the ensemble, and what comes back from disk."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fedmitr_flwr.common.errors import RunError, UploadError
from fedmitr_flwr.common.files import save_tensors
from fedmitr_flwr.config import Config
from fedmitr_flwr.uploads.stored import StoredWeights
from fedmitr_flwr.uploads.upload import Upload, digest, load, save, validate

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


def check(upload: Upload) -> None:
    validate(upload, REFERENCE, CONFIG, CODE)


def with_weight(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Upload], Upload]:
    return lambda upload: replace(upload, weights=upload.weights | {key: change(upload.weights[key])})


def with_value(**changes: object) -> Callable[[Upload], Upload]:
    return lambda upload: replace(upload, **changes)


def poisoned(value: float, place: int = -1) -> Callable[[Tensor], Tensor]:
    """One element of the tensor becomes `value`."""

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.flatten().clone()
        flat[place % len(flat)] = value
        return flat.view_as(tensor)

    return change


Mutation = tuple[Callable[[Upload], Upload], str]  # the change, and a word that the refusal must hold
FLOATING = [key for key, tensor in REFERENCE.items() if tensor.is_floating_point()]
OTHER_KINDS = (torch.bfloat16, torch.double, torch.long)


def of_key(key: str) -> list[Mutation]:
    others = {name: tensor for name, tensor in an_upload().weights.items() if name != key}
    return [
        (with_weight(key, lambda tensor: tensor[..., :-1]), key),
        (with_weight(key, lambda tensor: tensor[None]), key),
        *((with_weight(key, lambda tensor, kind=kind: tensor.to(kind)), key) for kind in OTHER_KINDS),
        (with_value(weights=others), key),
        (lambda upload: replace(upload, weights=upload.weights | {f"{key}.x": torch.ones(1)}), f"{key}.x"),
    ]


MUTATIONS: list[Mutation] = [
    *(mutation for key in FLOATING for mutation in of_key(key)),
    (with_weight("steps", lambda tensor: tensor.float()), "steps"),
    (with_weight("steps", lambda tensor: tensor.int()), "steps"),
    (with_value(weights={}), "lack 'cls_token', 'head.weight', 'head.bias' and 1 more"),
    *((with_value(fingerprint=other), "other code") for other in ("", CODE[::-1])),
    *((with_value(train_loss=loss), "training loss") for loss in (math.nan, math.inf)),
    *((with_value(seconds=seconds), f"took {seconds} seconds") for seconds in (math.nan, -1.0)),
    (with_value(num_examples=10**12), "screen.max-images is 1000"),
    (with_value(num_examples=MOST + 1, class_counts=None), "screen.max-images is 1000"),
    *(
        (with_value(class_counts=counts), "class counts")
        for counts in ((3, 9), (3, 0, 9, 0), (), (13, -1, 0), (3, 0, 8))
    ),
]
BROKEN_NUMBERS: st.SearchStrategy[Mutation] = st.one_of(
    st.tuples(st.sampled_from(FLOATING), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0)).map(
        lambda drawn: (with_weight(drawn[0], poisoned(*drawn[1:])), f"infinity in '{drawn[0]}'")
    ),
    st.integers(max_value=0).map(lambda n: (with_value(num_examples=n), f"on {n} images")),
    (st.integers(max_value=-1) | st.integers(min_value=CLIENTS)).map(
        lambda n: (with_value(client=n), "clients 0 to 3")
    ),
)


def assert_refused(mutation: Mutation, client: int, dtype: torch.dtype) -> None:
    """In one line that names the client and the thing."""
    change, named = mutation
    mutant = change(an_upload(client, dtype))
    with pytest.raises(UploadError) as caught:
        check(mutant)
    message = str(caught.value)
    assert message.startswith(f"client {mutant.client}: ")
    assert named in message
    assert "\n" not in message


def test_a_good_upload_passes() -> None:
    for dtype in (torch.float32, torch.float16):
        for client in range(CLIENTS):
            check(an_upload(client, dtype))
            check(replace(an_upload(client, dtype), class_counts=None))


def test_each_mutation_is_refused() -> None:
    for mutation in MUTATIONS:
        for dtype in (torch.float32, torch.half):
            assert_refused(mutation, client=1, dtype=dtype)


@given(BROKEN_NUMBERS, st.integers(0, CLIENTS - 1), st.sampled_from([torch.float32, torch.half]))
def test_any_mutation_of_any_client_is_refused(mutation: Mutation, client: int, dtype: torch.dtype) -> None:
    assert_refused(mutation, client, dtype)


def test_mixed_precision_is_allowed_but_what_overflowed_is_not() -> None:
    check(with_weight("head.bias", lambda tensor: tensor.half())(an_upload()))
    with pytest.raises(UploadError, match=r"infinity in 'head\.bias'"):
        check(with_weight("head.bias", lambda tensor: (tensor + 1e6).half())(an_upload()))  # float16 ends at 65504


patterns = st.lists(st.integers(0, 4), max_size=3).flatmap(
    lambda shape: st.integers(0, 2**32).map(
        lambda seed: torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(seed)).int()
    )
)
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


def test_every_finite_float16_comes_back_as_the_same_number_in_float32(tmp_path: Path) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    every = every[torch.isfinite(every)]
    upload = Upload(0, {"w": every, "n": torch.tensor(3)}, 1, 0.0, CODE)
    save(upload, tmp_path / "u.safetensors")
    got = load(tmp_path / "u.safetensors")
    assert got.weights["w"].dtype == torch.float32
    assert torch.equal(got.weights["w"].half().view(torch.int16), every.view(torch.int16))
    assert got.weights["n"].dtype == torch.int64
    assert got.num_bytes == upload.num_bytes == 2 * len(every) + 8  # not what the cast made of it


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
    assert "head.bias" in got.weights
    assert "head.bios" not in got.weights
    assert read == []
    assert torch.equal(got.weights["head.bias"], sent.weights["head.bias"].float())
    assert read == ["head.bias"]
    with pytest.raises(KeyError):
        got.weights["head.bios"]
    everything = dict(got.weights)
    assert sorted(read[2:]) == sorted(REFERENCE)
    assert [everything[key].dtype for key in REFERENCE] == [tensor.dtype for tensor in REFERENCE.values()]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replaced(path: Path) -> None:
    """By another client's whole file of the same size and age."""
    before = path.stat()
    save(an_upload(seed=1), path.with_name("other"))
    os.utime(path.with_name("other"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("other").replace(path)
    assert path.stat().st_size == before.st_size


def test_a_file_that_changes_while_it_is_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "client_001.safetensors"
    changes: dict[Callable[[Path], object], str] = {cut: "{} was changed", replaced: "{} was changed"}
    for change, problem in (changes | {Path.unlink: "cannot read {}"}).items():
        save(an_upload(), path)
        weights = load(path).weights
        weights["head.bias"]
        change(path)
        for use in (lambda weights: weights["head.bias"], dict):
            with pytest.raises(
                RunError, match=f"{problem.format(path)}.*; set resume-from to its run folder to go on$"
            ):
                use(weights)


def test_every_type_of_tensor_comes_back(tmp_path: Path) -> None:
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    weights = {str(kind): torch.tensor([[0, 1], [1, 1]]).to(kind) for kind in whole} | {"none": torch.ones(0, 3)}
    floats = {str(kind): torch.tensor([0.5, -3.0]).to(kind) for kind in (torch.float64, torch.bfloat16, torch.float16)}
    save(replace(an_upload(), weights=weights | floats), tmp_path / "u")
    got = load(tmp_path / "u").weights
    for name, tensor in (weights | {name: tensor.float() for name, tensor in floats.items()}).items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


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
    upload, name = an_upload(), "head.weight"
    save(upload, tmp_path / "u")
    assert digest(load(tmp_path / "u")) == digest(an_upload()) == digest(upload)
    assert digest(replace(upload, train_loss=9.0, fingerprint="x")) == digest(upload)
    changed = [
        replace(upload, client=2),
        replace(upload, num_examples=11),
        replace(upload, class_counts=(0, 3, 9)),
        with_weight(name, lambda tensor: tensor.T.contiguous())(upload),
        with_weight(name, lambda tensor: tensor * 2)(upload),
        replace(upload, weights={key: value for key, value in upload.weights.items() if key != name}),
    ]
    assert len({digest(each) for each in [upload, *changed]}) == 7
