"""Sums over frozen features, and the heads that they give: what many clients send is what one would have sent."""

import re

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.methods.fedpft import MOST, draw, train_head
from fedmitr_flwr.statistics.heads import UNSEEN, Head, lda, oas, ridge
from fedmitr_flwr.statistics.moments import Statistics, measure, problem, sent, total

CLASSES, WIDTH = 4, 6


def features(count: int = 300, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features (count, WIDTH), float32, whose mean depends on the class; labels of unequal number."""
    rng = stream(seed, "features")
    labels = torch.randint(classes, (count,), generator=rng) * torch.randint(2, (count,), generator=rng)
    spread, centres = torch.randn(WIDTH, WIDTH, generator=rng), 2 * torch.randn(classes, WIDTH, generator=rng)
    return centres[labels] + torch.randn(count, WIDTH, generator=rng) @ spread, labels


def told(features_ND: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    counts = tuple(torch.bincount(labels, minlength=CLASSES).tolist())
    return measure(features_ND, labels, CLASSES, variances=True), counts


def statistics_of(features_ND: Tensor, labels: Tensor) -> Statistics:
    return Statistics.of(*told(features_ND, labels))


def times(factor: int, one: Statistics) -> Statistics:
    """Of as many equal clients."""
    return Statistics(*(factor * part for part in (one.counts, one.sums, one.moment, one.squares)))


def by_client(clients: int) -> Statistics:
    """The same images, dealt out by class as far as possible, and added up again."""
    z, labels = features()
    shares = labels.argsort(stable=True).chunk(clients)
    return total(statistics_of(z[share], labels[share]) for share in shares)


@pytest.mark.parametrize("clients", [1, 7, 300])
def test_the_sums_of_many_clients_are_those_of_one_place(clients: int) -> None:
    pooled, parts = statistics_of(*features()), by_client(clients)
    for name in ("counts", "sums", "moment", "squares", "means", "scatter", "variances"):
        torch.testing.assert_close(getattr(parts, name), getattr(pooled, name), rtol=1e-12, atol=1e-10)


def test_the_sums_by_hand() -> None:
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]])
    tensors = measure(z, torch.tensor([1, 0, 1]), 3, variances=True)
    assert tensors["sums"].tolist() == [[3, 4], [6, -4], [0, 0]]
    assert tensors["moment"].tolist() == [35, -16, 56]  # Σ z1², Σ z1 z2, Σ z2²
    assert tensors["squares"].tolist() == [[9, 16], [26, 40], [0, 0]]
    whole = Statistics.of(tensors, (1, 2, 0))
    assert whole.moment.tolist() == [[35, -16], [-16, 56]]
    assert whole.means.tolist() == [[3, 4], [3, -2], [0, 0]]
    assert whole.variances.tolist() == [[0, 0], [4, 16], [0, 0]]
    assert whole.scatter.tolist() == [[8, -16], [-16, 32]]  # only class 1 has two images: ±(2, -4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}
    rounded = Statistics.of(sent(tensors), (1, 2, 0))  # whole numbers of this size are the same in float32
    assert all(torch.equal(getattr(rounded, part), getattr(whole, part)) for part in ("sums", "moment", "squares"))


def scores(head: Head, z: Tensor) -> np.ndarray:
    return (z.double() @ head.weight.T + head.bias).numpy()


@pytest.mark.parametrize(("shrinkage", "solver"), [(0.001, "lsqr"), (0.3, "eigen"), (1.0, "lsqr")])
def test_lda_is_scikit_learns_on_all_images(shrinkage: float, solver: str) -> None:
    z, labels = features()
    theirs = LinearDiscriminantAnalysis(solver=solver, shrinkage=shrinkage).fit(z.double().numpy(), labels.numpy())
    ours, (fresh, _) = lda(by_client(5), shrinkage), features(seed=1)
    # The eigen solver drops what all classes have in common, so only what a softmax sees is compared.
    wanted = theirs.predict_log_proba(fresh.double().numpy())
    given = torch.from_numpy(scores(ours, fresh)).log_softmax(1).numpy()
    np.testing.assert_allclose(given, wanted, rtol=1e-8, atol=1e-8)
    if solver == "lsqr":
        np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(ours.bias.numpy(), theirs.intercept_, rtol=1e-8)


def test_features_that_depend_on_each_other_change_no_score() -> None:
    """The covariance is singular then; a linear map of the features is no news to Gaussians."""
    z, labels = features()
    mapped = z.double() @ torch.randn(WIDTH, WIDTH + 3, generator=stream(2), dtype=torch.float64)
    given, wanted = (scores(lda(statistics_of(each, labels), 0.0), each) for each in (mapped, z))
    np.testing.assert_allclose(given, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("count", [8, 300])
def test_the_chosen_shrinkage_is_scikit_learns(count: int) -> None:
    z, labels = features(count)
    statistics = statistics_of(z, labels)
    centred = z.double() - statistics.means[labels]
    assert oas(statistics) == pytest.approx(OAS(assume_centered=True).fit(centred.numpy()).shrinkage_, rel=1e-9)


def test_one_image_of_each_class_is_enough() -> None:
    z, labels = torch.eye(CLASSES, WIDTH), torch.arange(CLASSES)
    statistics = statistics_of(z, labels)
    assert oas(statistics) == 1.0
    for head in (lda(statistics, 1.0), ridge(statistics, 1.0)):
        assert torch.isfinite(head.weight @ torch.ones(WIDTH).double() + head.bias).all()
    assert scores(ridge(statistics, 1e-9), z).argmax(1).tolist() == labels.tolist()
    drawn, classes, _ = draw(statistics, stream(0))
    assert torch.equal(classes, labels)
    assert torch.equal(drawn, z.double())


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_ridge_is_scikit_learns_on_all_images(penalty: float) -> None:
    z, labels = features()
    onehot = torch.nn.functional.one_hot(labels, CLASSES).double().numpy()
    theirs = Ridge(alpha=penalty, solver="cholesky").fit(z.double().numpy(), onehot)
    ours = ridge(by_client(5), penalty)
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ours.bias.numpy(), theirs.intercept_, rtol=1e-8, atol=1e-10)


def test_a_class_that_nobody_has_is_never_the_answer_and_changes_no_other() -> None:
    z, labels = features(classes=CLASSES - 1)
    statistics = statistics_of(z, labels)
    few = Statistics(statistics.counts[:-1], statistics.sums[:-1], statistics.moment)
    for make in (lda, ridge):
        ours, without = make(statistics, 0.1), make(few, 0.1)
        torch.testing.assert_close(ours.weight[:-1], without.weight)
        torch.testing.assert_close(ours.bias[:-1], without.bias)
        assert (scores(ours, z).argmax(1) < CLASSES - 1).all()
    assert lda(statistics, 0.1).bias[-1] == UNSEEN


def problem_of(features_ND: Tensor, labels: Tensor, **change: Tensor) -> str | None:
    tensors, counts = told(features_ND, labels)
    return problem(sent(tensors) | change, counts, sent(tensors))


def test_what_can_be_no_sums_is_told() -> None:
    z, labels = features()
    z /= z.square().mean().sqrt()  # as long as taps may be
    tensors, counts = told(z, labels)
    own = sent(tensors)
    sums, moment, squares = (own[name] for name in ("sums", "moment", "squares"))
    assert problem_of(z, labels) is None
    for change, problem_told in (
        ({"sums": sums[:, :-1]}, r"sums are float32 \(4, 5\), not float32 \(4, 6\)$"),
        ({"moment": moment[:-1]}, r"moment are float32 \(20,\), not float32 \(21,\)$"),
        ({"squares": squares.double()}, r"squares are float64 .*; 0\.1\.0 summed other .* upload\.extras = 'counts'"),
        ({"sums": sums * float("nan")}, "NaN or infinity in its statistics' sums"),
        ({"moment": moment / 0}, "NaN or infinity in its statistics' moment"),
        ({"sums": sums * 30}, "negative eigenvalue"),
        ({"moment": -moment}, "negative eigenvalue"),
        ({"squares": squares * 1.001}, "do not add up to the moment's diagonal"),
        ({"squares": squares.flip(0)}, "a class has a negative variance"),
    ):
        assert re.search(problem_told, problem_of(z, labels, **change))
    first, second, *rest = counts
    assert "a class without images has a sum" in problem(own, (0, first + second, *rest), own)
    assert "negative eigenvalue" in problem(own, (1, first + second - 1, *rest), own)
    for count in (1, 2, 3000):  # honest sums pass, however few or far from zero
        z, labels = features(count)
        far = 1e3 + z
        assert problem_of(far / far.square().mean().sqrt(), labels) is None


@pytest.mark.parametrize(
    ("factor", "wanted"), [(100, "a feature is 100 long"), (0.1, "a feature is 0.1 long"), (1, "")]
)
def test_sums_that_no_taps_give_are_told(factor: float, wanted: str) -> None:
    """Taps are of normalised tokens: a feature whose numbers are of another size, or of other counts, cannot be."""
    z, labels = features()
    z /= z.square().mean().sqrt()
    found = problem_of(factor * z, labels)
    assert wanted in found if wanted else found is None
    tensors, counts = told(z, labels)
    own = sent(tensors)
    assert "a feature is 0.1 long" in problem(own, tuple(100 * count for count in counts), own)
    z[labels == 3] = 1.3  # one class that is longer than any may be on average
    assert "the mean of a class is 1.3 long" in problem_of(z, labels)


def test_drawn_features_have_the_clients_counts_means_and_variances() -> None:
    statistics = statistics_of(*features(60))
    drawn, classes, _ = draw(times(1000, statistics), stream(0, "draw"), most=10**6)
    again, wanted = statistics_of(drawn, classes), statistics.variances
    assert torch.equal(again.counts, 1000 * statistics.counts)
    # Standard errors of a mean and of a variance, of at least 4,000 draws: σ / 60 and σ² √2 / 60.
    assert ((again.means - statistics.means).abs() <= 5 * wanted.sqrt() / 60).all()
    assert ((again.variances - wanted).abs() <= 5 * 2**0.5 * wanted / 60).all()


def test_a_claim_of_many_images_is_drawn_up_to_the_limit_and_weighs_in_full() -> None:
    z, labels = features(60)
    honest = statistics_of(z, labels)
    claimed = times(10**7, honest)
    _, classes, weights = draw(claimed, stream(0))
    assert torch.bincount(classes).tolist() == [MOST] * CLASSES
    torch.testing.assert_close(torch.zeros(CLASSES).double().index_add(0, classes, weights), claimed.counts)
    assert draw(honest, stream(0))[2].unique().tolist() == [1.0]
    weighted = train_head(z.double(), labels, CLASSES, 1 + (labels == 0).double())
    twice = train_head(torch.cat([z, z[labels == 0]]).double(), torch.cat([labels, labels[labels == 0]]), CLASSES)
    torch.testing.assert_close(weighted.weight, twice.weight, atol=1e-5, rtol=1e-4)


def test_the_trained_head_is_scikit_learns() -> None:
    z, labels = features()
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(z.double().numpy(), labels.numpy())
    ours = train_head(z.double(), labels, CLASSES)
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=1e-4)
    given = torch.from_numpy(scores(ours, z)).softmax(1).numpy()
    np.testing.assert_allclose(given, theirs.predict_proba(z.double().numpy()), atol=1e-5)
