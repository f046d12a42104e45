"""The start whose layers are fitted: the closed form, cases whose answer is known, and its place in the whole."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import a_vit, an_upload, fused, same, settings, some_images
from torch import Tensor, nn

from fedmitr_flwr import methods
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.scout import first_images
from fedmitr_flwr.merging import layerwise
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.merging.layerwise import fit_layers, solve
from fedmitr_flwr.methods.contract import Stopwatch
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import vit_of

CONFIG = settings()
TARGETS = torch.arange(40) % 10
IMAGES = some_images(CONFIG, 40)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def uploads(count: int = 2) -> list[Upload]:
    return [an_upload(CONFIG, client, 10 + 5 * client) for client in range(count)]


def the_average(of: list[Upload]) -> VisionTransformer:
    return vit_of(CONFIG.model, average(of)).eval()


def fitted(of: list[Upload], ridge: float = 0.01, images: Tensor = IMAGES) -> VisionTransformer:
    student = the_average(of)
    fit_layers(student, Ensemble.of(of, CONFIG.model, CONFIG.ensemble), images, TARGETS[: len(images)], ridge)
    return student


def close(one: VisionTransformer, other: VisionTransformer, atol: float) -> bool:
    others = other.state_dict()
    return all(torch.allclose(each, others[name], rtol=0, atol=atol) for name, each in one.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_solved_as_numpy_solves_the_normal_equations(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "ROWS", 7)  # 40 rows in 6 sums
    torch.manual_seed(0)
    layer, ridge = nn.Linear(4, 3, bias=bias), 0.3
    given, wanted = torch.randn(8, 5, 4), torch.randn(8, 5, 3)
    x = np.concatenate([given.reshape(-1, 4), np.ones((40, 1))], 1)[:, : 4 + bias].astype(np.float64)
    before = np.concatenate([layer.weight, layer.bias[:, None]], 1) if bias else layer.weight.numpy()
    hold = ridge * (x**2).sum(0).mean()
    right = x.T @ wanted.reshape(-1, 3).numpy().astype(np.float64) + hold * before.T
    solution = np.linalg.inv(x.T @ x + hold * np.eye(4 + bias)) @ right
    solve(layer, given, wanted, ridge)
    np.testing.assert_allclose(layer.weight, solution[:4].T, atol=1e-6)
    if bias:
        np.testing.assert_allclose(layer.bias, solution[4], atol=1e-6)


def test_one_client_is_found_from_anywhere() -> None:
    """Its layers can be had exactly, one after the other, whatever the student was; what is not solved is given."""
    only, teacher, student = an_upload(CONFIG, 1), a_vit(CONFIG, 1), a_vit(CONFIG, 2)
    for name, module in student.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            for key, _ in module.named_parameters(recurse=False):
                getattr(module, key).copy_(getattr(teacher.get_submodule(name), key))
    images, fresh = some_images(CONFIG, 400), some_images(CONFIG, 50, seed=1)  # that it was not solved on
    before = (student(images) - teacher(images)).square().mean()
    fit_layers(student, Ensemble.of([only], CONFIG.model, CONFIG.ensemble), images, torch.zeros(400).long(), 1e-9)
    assert (student(fresh) - teacher(fresh)).square().mean() < 1e-6 * before


def of_other_heads(images: int) -> list[Upload]:
    """One of 20 images, and one of so many of which only the head is another."""
    first, second = an_upload(CONFIG, 0, 20, seed=3), an_upload(CONFIG, 1, images, seed=3)
    heads = {
        name: t + torch.randn(t.shape, generator=stream(1)) for name, t in second.weights.items() if "head" in name
    }
    return [first, replace(second, weights=second.weights | heads)]


def test_clients_that_differ_in_their_heads_only_have_the_mean_head() -> None:
    """All hidden layers agree, and the mean of linear heads is a linear head: weights 0.4 and 0.6, as the average."""
    alike = [an_upload(CONFIG, client, 10 + client, seed=3) for client in range(3)]
    for of, ridge in ((of_other_heads(30), 1e-6), (alike, 1.0)):
        assert close(fitted(of, ridge), the_average(of), atol=1e-4)


def test_it_answers_more_as_the_clients_do() -> None:
    of = uploads(3)
    ensemble, average, after = Ensemble.of(of, CONFIG.model, CONFIG.ensemble), the_average(of), fitted(of)
    for images, share in ((IMAGES, 0.2), (some_images(CONFIG, 200, seed=5), 1)):
        wanted = ensemble(images)  # mean logits
        assert (after(images) - wanted).square().mean() < share * (average(images) - wanted).square().mean()


def test_norms_positions_and_prefix_tokens_are_the_averages() -> None:
    of = uploads()
    before, after = the_average(of).state_dict(), fitted(of).state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if "norm" in name or name in ("cls_token", "pos_embed")}


def test_the_order_of_clients_and_where_they_are_kept_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    together = fitted(uploads(3))
    assert close(together, fitted(uploads(3)[::-1]), atol=1e-5)
    monkeypatch.setattr("fedmitr_flwr.ensemble.teachers.ROOM", 1)
    assert close(together, fitted(uploads(3)), atol=0)


def test_each_image_is_of_those_who_know_its_class() -> None:
    """One client has the even classes, one the odd ones, and only their heads differ: the answers are numpy's."""
    both = of_other_heads(20)
    ensemble, student = Ensemble.of(both, CONFIG.model, CONFIG.ensemble), the_average(both)
    even = (torch.arange(10) % 2 == 0).float()
    ensemble.weights = torch.stack([even, 1 - even])
    fit_layers(student, ensemble, IMAGES, TARGETS, 1e-9)
    says = torch.where(TARGETS[:, None] % 2 == 0, ensemble.teachers[0](IMAGES), ensemble.teachers[1](IMAGES))
    features = student.forward_head(student.forward_features(IMAGES), pre_logits=True)
    x = np.concatenate([features, np.ones((40, 1))], 1).astype(np.float64)
    answers = x @ np.linalg.lstsq(x, says.numpy().astype(np.float64), rcond=1e-6)[0]
    np.testing.assert_allclose(student(IMAGES).numpy(), answers, atol=1e-2)
    assert np.abs(the_average(both)(IMAGES).numpy() - answers).max() > 0.1


def test_more_images_than_fit_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "TOKENS", 24 * 17)  # a class token and 16 patches
    assert close(fitted(uploads()), fitted(uploads(), images=IMAGES[:24]), atol=0)
    assert not close(fitted(uploads()), fitted(uploads(), images=IMAGES[:23]), atol=1e-6)


def test_the_method_fits_the_average_on_scouting_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step, as its parts are tested above: by hand the same bits."""
    monkeypatch.setattr("fedmitr_flwr.inversion.scout.IMAGES_PER_CLASS", 2)
    config, stopwatch = settings(method="layerwise"), Stopwatch()
    with torch.enable_grad():
        found = fused(config, uploads(), stopwatch=stopwatch)
        ensemble = Ensemble.of(uploads(), config.model, config.ensemble)
        images, targets = first_images(ensemble, config)
    student = the_average(uploads())
    fit_layers(student, ensemble, images, targets)
    assert same(found.weights, student.state_dict())
    assert set(stopwatch.seconds) == {"inversion", "fitting"}


def test_methods_without_merged_heads_start_from_the_average() -> None:
    config = settings(**{"distill.init": "classwise"})
    for method in ("layerwise", "adi", "feddf"):
        assert methods.in_force(replace(config, method=method)).distill.init == "average"
        kept = methods.in_force(settings(method=method, **{"distill.init": "initial"})).distill.init
        assert kept == ("average" if method == "layerwise" else "initial")
