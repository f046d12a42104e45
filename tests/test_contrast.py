"""What teachers say together by the differences between classes that each knows: least squares, solved otherwise."""

import numpy as np
import pytest
import torch
from tiny import a_vit, settings, some_images
from torch import Tensor
from torch.testing import assert_close

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.ensemble.contrast import Contrast
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.vit.tokens import all_positions, patchify

K, Y = 3, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=stream(seed), dtype=torch.float64)


def said(weights_KY: Tensor, logits_K: Tensor) -> Tensor:
    contrast = Contrast(weights_KY)
    parts = [contrast.part(k, logits) for k, logits in enumerate(logits_K)]
    return contrast.scores(contrast.join(contrast.join(parts[0], parts[1]), parts[2]))


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def test_it_is_the_least_squares_of_the_model() -> None:
    """By the solver of numpy: one row for each teacher and class, with the teachers' constants as further unknowns."""
    weights, logits = drawn(K, Y), drawn(K, Y, seed=1)
    mean = (weights / weights.sum(0)).numpy()
    known = mean / mean.sum(1, keepdims=True)
    hold = np.mean(known.sum(0) - (known**2).sum(0))
    rows, wanted = [], []
    for k in range(K):
        for y in range(Y):
            row = np.zeros(Y + K)
            row[y] = row[Y + k] = np.sqrt(known[k, y])
            rows.append(row)
            wanted.append(np.sqrt(known[k, y]) * logits[k, y].item())
    for y in range(Y):
        rows.append(np.sqrt(hold) * np.eye(Y + K)[y])
        wanted.append(np.sqrt(hold) * (mean[:, y] @ centred(logits)[:, y].numpy()))
    found, *_ = np.linalg.lstsq(np.stack(rows), np.array(wanted), rcond=None)
    np.testing.assert_allclose(said(weights, logits).numpy(), found[:Y], rtol=1e-10)


def test_teachers_that_agree_are_repeated() -> None:
    """But for what moves all logits of one alike, which is to change nothing, as is a factor of a class's weights."""
    weights, logits, moved = drawn(K, Y), drawn(4, Y, seed=1), 10 * drawn(K, 4, 1, seed=2)
    assert_close(said(weights, logits.expand(K, 4, Y) + moved), centred(logits))
    apart = drawn(K, 4, Y, seed=3)
    assert_close(said(weights * drawn(Y, seed=4), apart + moved), said(weights, apart))


def test_classes_that_nobody_compares_are_told_apart_by_the_weighted_mean() -> None:
    """Three teachers of one class each; and of a teacher that knows nothing, nothing is heard."""
    weights, logits = torch.eye(K, dtype=torch.float64), drawn(K, 4, K, seed=1)
    mean = torch.stack([centred(logits)[k, :, k] for k in range(K)], dim=1)
    assert_close(said(weights, logits), mean)
    nearly = torch.eye(K) + 1e-9 * (1 - torch.eye(K))  # float32
    assert_close(said(nearly, logits.float()), mean.float(), rtol=1e-2, atol=1e-2)
    weights = drawn(K, Y) * torch.tensor([[1.0], [1.0], [0.0]])
    first, second = drawn(K, 4, Y, seed=2), drawn(K, 4, Y, seed=2)
    second[2] = 100
    assert_close(said(weights, first), said(weights, second))


def test_a_difference_is_believed_of_who_knows_both_classes() -> None:
    """The first teacher knows the classes 0 and 1, the second 2 to 4; what either says of the others counts little."""
    weights = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.float64)
    logits = drawn(K, Y, seed=1)
    found = said(weights, logits)
    assert_close(found[0] - found[1], logits[0, 0] - logits[0, 1])
    assert_close(found[3] - found[4], logits[1, 3] - logits[1, 4])


@pytest.mark.parametrize("teach", ["logits", "contrast"])
def test_the_ensemble_teaches_by_it(teach: str) -> None:
    """Of the class token and of each patch, teacher by teacher, as of whole answers at once."""
    config = settings()
    classes, teachers = config.model.num_classes, [a_vit(config, seed) for seed in range(K)]
    weights, images = drawn(K, classes).float(), some_images(config, 6)
    weights /= weights.sum(0)
    patches = patchify(images, config.model.patch_size)
    ensemble = Ensemble(teachers, weights, "probs", teach)
    scores = ensemble.scores(patches, all_positions(patches))
    answers = ensemble.answers(images)
    wanted = said(weights, answers) if teach == "contrast" else (weights[:, None] * answers).sum(0)
    assert_close(scores.cls, wanted, rtol=1e-4, atol=1e-5)
    assert scores.patches.shape == (*patches.shape[:2], classes)
