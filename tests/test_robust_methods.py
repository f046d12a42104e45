"""FedMedian and Krum: numbers by hand, Flower's own implementations, and what a hostile upload can do."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given
from hypothesis import strategies as st
from tiny import an_upload, fused, same, settings

from fedmitr_flwr import methods
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.methods.contract import Fused
from fedmitr_flwr.methods.fedmedian import median
from fedmitr_flwr.methods.krum import choose, scores
from fedmitr_flwr.uploads.updates import gram, squared_distances
from fedmitr_flwr.uploads.upload import Upload


def points(*places: float) -> list[Upload]:
    """Uploads with one number each."""
    return [Upload(client, {"w": torch.tensor([float(place)])}, 1, 0.0, "") for client, place in enumerate(places)]


def made_by(method: str, uploads: Sequence[Upload], **changes: Any) -> tuple[Fused, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    return fused(settings(method=method, **{"partition.clients": len(uploads)}, **changes), uploads, lines), lines


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_median_is_numpys(rows: list[list[float]]) -> None:
    values = np.array(rows, np.float32)
    np.testing.assert_allclose(
        median(torch.from_numpy(values)).numpy(), np.median(values.astype(np.float64), axis=0), rtol=1e-12
    )


def test_fedmedian_is_the_median_of_every_number() -> None:
    uploads = [an_upload(settings(), client, 10 + client) for client in range(6)]
    made, _ = made_by("fedmedian", uploads)
    for name, tensor in made.weights.items():
        every = np.stack([upload.weights[name].double().numpy() for upload in uploads])
        np.testing.assert_allclose(tensor.numpy(), np.median(every, axis=0), rtol=1e-6, atol=1e-9)
        assert tensor.dtype == uploads[0].weights[name].dtype
    assert same(dict(made.predict.state_dict()), dict(made.weights))


def test_a_minority_cannot_drag_the_median_away() -> None:
    """Whatever two of five send, each number stays between those of the other three."""
    good = [an_upload(settings(), client) for client in range(3)]
    evil = [replace(good[0], weights={name: by * w for name, w in good[0].weights.items()}) for by in (1e6, -1e6)]
    made, _ = made_by("fedmedian", [evil[0], *good, evil[1]])
    for name, tensor in made.weights.items():
        honest = torch.stack([upload.weights[name] for upload in good])
        assert (tensor >= honest.min(0).values).all()
        assert (tensor <= honest.max(0).values).all()


def test_distances_are_those_of_the_vectors() -> None:
    uploads = [an_upload(settings(), client) for client in range(4)]
    vectors = torch.stack([torch.cat([w.double().flatten() for w in upload.weights.values()]) for upload in uploads])
    for origin in (uploads[2].weights, {name: torch.zeros_like(w) for name, w in uploads[0].weights.items()}):
        found = squared_distances(gram(uploads, origin))
        torch.testing.assert_close(found, torch.cdist(vectors, vectors) ** 2, rtol=1e-9, atol=1e-9)


def test_krum_by_hand() -> None:
    """0, 3, 4, 6, 90 with f = 1: two nearest each. 0: 9 + 16; 3: 1 + 9; 4: 1 + 4; 6: 4 + 9; 90: 84² + 86²."""
    uploads = points(0, 3, 4, 6, 90)
    distances = squared_distances(gram(uploads, uploads[0].weights))
    assert scores(distances, hostile=1).tolist() == [25, 10, 5, 13, 84**2 + 86**2]
    assert choose(uploads, hostile=1).client == 2
    # With f = 0 three neighbours count: 3 -> 1 + 9 + 9, 4 -> 1 + 4 + 16.
    assert scores(distances, hostile=0)[:3].tolist() == [9 + 16 + 36, 19, 21]
    assert choose(uploads, hostile=0).client == 1


@pytest.mark.parametrize("hostile", [0, 1, 2])
def test_krum_is_flowers(hostile: int) -> None:
    uploads = [an_upload(settings(), client) for client in range(6)]
    replies = [RecordDict({"arrays": ArrayRecord(dict(upload.weights))}) for upload in uploads]
    (theirs,) = select_multikrum(replies, hostile, 1)
    made, lines = made_by("krum", uploads, **{"krum.hostile": hostile})
    assert same(dict(made.weights), dict(theirs["arrays"].to_torch_state_dict()))
    assert lines == [{"stage": "krum", "client": [reply is theirs for reply in replies].index(True)}]
    assert same(dict(made.predict.state_dict()), dict(made.weights))


def test_krum_needs_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"krum.hostile = 1 needs 4 uploads, not 3; lower krum.hostile"):
        methods.check(settings(method="krum"), 3)
    methods.check(settings(method="krum"), 4)
    with pytest.raises(ConfigError, match="needs 5 uploads, not 4"):
        choose(points(0, 1, 2, 3), hostile=2)
