"""`fedmitr diagnose`: every quantity against figures known by hand, a closed form or a limit; and the command."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from test_report_page import SECTIONS, Page
from tiny import Sgd, a_vit, an_ensemble, settings, some_images
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr import pipeline
from fedmitr_flwr.cli import main
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.diagnostics import diagnose as together
from fedmitr_flwr.diagnostics import stability, variance
from fedmitr_flwr.diagnostics.diagnose import ARMS, Sizes, diagnose
from fedmitr_flwr.diagnostics.gap import Shown, gap
from fedmitr_flwr.diagnostics.jitter import Jitter, noise_and_power, on_the_way
from fedmitr_flwr.diagnostics.norms import gradient_norms, student_norms
from fedmitr_flwr.diagnostics.table import tables
from fedmitr_flwr.distillation.distil import ask, questions
from fedmitr_flwr.distillation.losses import distillation_loss
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.inversion.invert import PIXELS, alive_counts, invert
from fedmitr_flwr.inversion.pool import Pool
from fedmitr_flwr.report.page import write_page
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.vit.tokens import all_positions, forward_tokens, patchify

FEW = Sizes(images=12, replaced=4, epochs=2, jittered=3, draws=2, gradients=3, test=20)


def a_pool(config: Config, count: int = 10, seed: int = 0) -> Pool:
    targets = torch.arange(count) % 10
    flip, rng = config.data.flips, stream(seed, "pool")
    return invert(an_ensemble(config), targets, config.inversion, config.model, flip=flip, rng=rng)


ALL = torch.arange(4)[None]
SLOPES = torch.tensor([1.0, 2.0, 3.0, 4.0])  # by place, of an image of 2 x 2 patches of one pixel


@pytest.mark.parametrize("change", [Jitter(roll=(0, 1)), Jitter(flip=True)])
def test_a_loss_that_is_linear_is_noisy_by_its_places_alone(change: Jitter) -> None:
    """Its gradient is the same whatever the pixels are. Moved by one column, 1 and 2 change places, and 3 and 4."""
    canvas = torch.randn(1, 4, 1, generator=stream(0))

    def slope(_: Tensor, positions: Tensor) -> Tensor:
        return SLOPES[positions][..., None]

    noise, power = noise_and_power(slope, canvas, ALL, [Jitter(), change], 1)
    assert noise.tolist() == [[0.25] * 4]
    assert power.tolist() == [[2.5, 2.5, 12.5, 12.5]]
    noise, power = noise_and_power(slope, canvas, ALL, [Jitter(noise=torch.ones(1, 1, 2, 2)), Jitter()], 1)
    assert noise.tolist() == [[0.0] * 4]
    assert power.tolist() == [[1.0, 4.0, 9.0, 16.0]]


def test_a_quadratic_loss_has_the_noise_of_its_input_and_what_is_not_seen_has_none() -> None:
    """½ a² x² has the gradient a² x, whose variance under noise of ± s is a⁴ s²; its mean square adds a⁴ x²."""
    canvas, seen = torch.tensor([[[1.0], [2.0], [0.0], [5.0]]]), torch.tensor([[2, 1]])
    noise = torch.full((1, 1, 2, 2), 0.5)
    changes = [Jitter(noise=noise), Jitter(noise=-noise)]
    found, power = noise_and_power(lambda patches, _: 4 * patches, canvas, seen, changes, 1)
    assert found.tolist() == [[0.0, 4.0, 4.0, 0.0]]
    assert power.tolist() == [[0.0, 68.0, 4.0, 0.0]]


def test_the_way_is_that_of_the_inversion() -> None:
    """From the same starts, the same patches are alive at the end, and halted ones have not moved since."""
    config = settings()
    targets = torch.arange(3)
    pool = invert(an_ensemble(config), targets, config.inversion, config.model, flip=False, rng=stream(3))
    starts = PIXELS.start(3, config.model, stream(3))
    found = on_the_way(an_ensemble(config), config, "sparse", starts, targets, stream(3))
    assert list(found) == [0, 1, 2, 4, 8]  # 0, 10, 20, 50 and 100 % of 8 steps
    assert [positions.shape[1] for _, positions in found.values()] == [16, 16, 11, 7, 7]  # halts at 2 and 4
    canvas, positions = found[8]
    assert torch.equal(torch.zeros_like(pool.alive).scatter(1, positions, True), pool.alive)
    assert torch.equal(canvas[~pool.alive], pool.patches[~pool.alive])
    dense = on_the_way(an_ensemble(config), config, "dense", starts, targets, stream(3))
    assert torch.equal(dense[1][0], found[1][0])  # the same until patches are halted
    assert dense[8][1].shape[1] == 16


def test_lengths_of_a_linear_model_s_gradients_by_hand() -> None:
    """At zero weights p is 1/2 for both classes: the gradient is ± (1/2, -1/2) zᵀ, of length |z| / √2."""
    weights = torch.zeros(2, 2, requires_grad=True)
    features, labels = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0, 1])
    found = gradient_norms(lambda i: F.cross_entropy(weights @ features[i], labels[i]), [weights], 2)
    assert found["max"] == pytest.approx(5 / math.sqrt(2))
    assert found["mean"] == pytest.approx(3 / math.sqrt(2))
    assert found["p95"] == pytest.approx((1 + 0.95 * 4) / math.sqrt(2))
    assert found["trace"] == pytest.approx((25 + 1) / 4 - (3**2 + 3**2) / 8)  # E|g|² - |E g|², z₀ - z₁ = (3, 3)


def test_the_student_s_norm_is_that_of_the_loss_it_learns_from() -> None:
    config = settings()
    ensemble, student, pool = an_ensemble(config), a_vit(config, 5), a_pool(config, 1)
    found = student_norms(student, ensemble, pool, 3)
    (question,) = questions(ensemble, pool, config, stream(0))  # mixed with itself, half of its patches left out
    assert question.positions.shape[1] == 8
    soft = ensemble.scores(pool.patches, pool.positions)
    every = torch.ones(1, 16)
    labels = question.labels[0]._replace(share=torch.ones(1), own=every, dense=pool.dense.float())
    parts = distillation_loss(forward_tokens(student, pool.patches, pool.positions), soft, [labels], ensemble.teach)
    for name, loss in {"whole": parts.total(), "pseudo-labels": parts.high}.items():
        parts_of = torch.autograd.grad(
            loss, list(student.parameters()), retain_graph=True, materialize_grads=True, allow_unused=True
        )
        norm = torch.cat([part.flatten() for part in parts_of]).norm().item()
        assert [found[name][each] for each in ("max", "p95", "mean")] == pytest.approx([norm] * 3, rel=1e-5)
        assert found[name]["trace"] == pytest.approx(0, abs=1e-5 * norm**2)  # of one image


def test_the_closed_form_for_the_head_is_what_autograd_finds() -> None:
    config = settings()
    ensemble, student, pool = an_ensemble(config), a_vit(config, 5), a_pool(config, 3)
    found = variance.head_variance(student, ensemble, pool)
    logits = forward_tokens(student, pool.patches, pool.positions).patches
    soft = ensemble.scores(pool.patches, pool.positions).patches.softmax(-1)
    labels = torch.where(pool.dense[..., None], F.one_hot(pool.targets, 10)[:, None].float(), soft)
    losses = -(labels * logits.log_softmax(-1)).sum(-1)
    of_head = list(student.head.parameters())
    for unit, samples in {"token": losses.flatten(), "image": losses.mean(1)}.items():
        rows = [torch.autograd.grad(loss, of_head, retain_graph=True) for loss in samples]
        gradients = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
        assert found[unit] == pytest.approx(gradients.var(0, correction=0).sum().item(), rel=1e-4)


def test_soft_labels_save_what_the_law_of_total_variance_says() -> None:
    """Every token four times, with hard labels in the shares of its soft one: (2, 1, 1) or (0, 2, 2) of 4."""
    rng = stream(0)
    said = torch.rand(6, 5, 3, generator=rng).double().softmax(-1)
    features = torch.randn(6, 5, 4, generator=rng).double()
    soft = torch.tensor([[0.5, 0.25, 0.25], [0, 0.5, 0.5]]).double()[torch.randint(2, (6, 5), generator=rng)]
    drawn = torch.tensor([[0, 0, 1, 2], [1, 1, 2, 2]])[(soft[..., 0] == 0).long()]  # (6, 5, 4)
    hard = torch.cat([F.one_hot(drawn[..., n], 3).double() for n in range(4)], 1)
    by_hard = variance.trace(said.repeat(1, 4, 1) - hard, features.repeat(1, 4, 1))["token"]
    by_soft = variance.trace(said - soft, features)["token"]
    assert by_hard - by_soft == pytest.approx(variance.within(soft, features))
    assert variance.within(hard, features.repeat(1, 4, 1)) == 0
    by_hand = ((1 - soft.square().sum(-1)) * features.square().sum(-1)).mean().item()
    assert variance.within(soft, features) == pytest.approx(by_hand)


def test_labels_that_are_right_have_no_bias_and_a_small_sample_adds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert variance.squared_mean(torch.tensor([[3.0, 4.0]] * 5)) == 25
    assert variance.squared_mean(torch.tensor([[1.0], [-1.0]])) == -1  # 0² - 2 / 2
    config = settings()
    patches = patchify(some_images(config, 6), 2)
    real = Shown(patches, all_positions(patches), torch.arange(6))
    of = partial(variance.bias, a_vit(config, 5), an_ensemble(config), real, 7)
    assert of()["bias"] != 0
    monkeypatch.setattr(
        variance, "soft_labels", lambda *_: F.one_hot(real.labels, 10).double()[:, None].expand(-1, 16, -1)
    )
    assert of() == {"bias": 0, "saved": 0, "within": 0}


def test_equal_pools_give_equal_students_and_one_step_moves_by_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    ensemble, start, pool = an_ensemble(config), a_vit(config, 5), a_pool(config)
    probes = {"pool": Shown.of(pool)}
    same = pool.rows(torch.arange(4))
    student, found = stability.replace_one(start, ensemble, pool, same, config, 5, probes)
    assert found["steps"] == [0, 1, 2, 4, 5]
    assert (found["distance"], found["losses"]) == ([0.0] * 5, {"pool": [0.0] * 5})
    assert found["way"][0] == 0 < found["way"][-1]
    assert start.head.weight.equal(a_vit(config, 5).head.weight)
    assert not student.head.weight.equal(start.head.weight)

    monkeypatch.setattr(stability, "student_stepper", lambda vit, _, total: Sgd(vit, 0.01, total))
    others = a_pool(config, 4, seed=1)
    _, found = stability.replace_one(start, ensemble, pool, others, config, 1, probes)
    both = []
    for each in (pool, stability.join([others, stability.behind(pool, 4)])):
        (question,) = questions(ensemble, each, config, stream(config.seed, "diagnostics", "distillation"))
        answers = forward_tokens(start, question.patches, question.positions)
        loss = distillation_loss(answers, ask(ensemble, question), question.labels, ensemble.teach).total()
        gradients = torch.autograd.grad(loss, list(start.parameters()), allow_unused=True, materialize_grads=True)
        both.append(torch.cat([gradient.flatten() for gradient in gradients]))
    # SGD with momentum: the first step is the gradient's.
    assert found["distance"][1] == pytest.approx(0.01 * (both[0] - both[1]).norm().item(), rel=1e-3)
    assert found["way"][1] == pytest.approx(0.01 * both[0].norm().item(), rel=1e-3)


def test_a_student_that_says_nothing_has_no_gap() -> None:
    config = settings()
    student, pool = a_vit(config, 5), a_pool(config)
    torch.nn.init.zeros_(student.head.weight)
    torch.nn.init.zeros_(student.head.bias)
    patches = patchify(some_images(config, 5), 2)
    test = Shown(patches, all_positions(patches), torch.tensor([0, 0, 1, 2, 0]))
    found = gap(student, {"pool": Shown.of(pool), "test": test})
    assert [found[name]["loss"] for name in ("pool", "test", "gap")] == pytest.approx(
        [math.log(10)] * 2 + [0], abs=1e-6
    )
    assert [found[name]["accuracy"] for name in ("pool", "test", "gap")] == pytest.approx([10, 60, 50])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return pipeline.run(settings(**{"out-dir": str(tmp_path_factory.mktemp("diagnosed"))}), "run")


def test_the_command_writes_equal_bits_a_table_and_a_section(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_page(run.path).read_text()
    assert "Not measured" in before
    monkeypatch.setattr(together, "diagnose", partial(diagnose, sizes=FEW))
    assert main(["diagnose", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"report: {run.path / 'report.html'}"
    first = (run.path / "diagnostics.json").read_bytes()
    found = json.loads(first)
    assert diagnose(run, FEW) == found
    assert (run.path / "diagnostics.json").read_bytes() == first
    assert Page(run.path / "report.html").sections == SECTIONS
    page = (run.path / "report.html").read_text()
    noises = len(found["input_noise"]) - 1  # all but its steps
    assert page.count("<svg ") - before.count("<svg ") == noises + 1
    for table in tables(found):
        assert table.title in out
        for row in table.rows:
            assert len(row) == len(table.head)
            assert all(cell in out and f">{cell}</td>" in page for cell in row)

    assert found["sizes"]["images"] == 12
    assert found["sizes"]["test"] == 20
    noise = found["input_noise"]
    assert set(noise) == {"steps", "roll", "noise"}  # digits are not mirrored
    assert noise["roll"]["sparse"]["halted"]["noise"][-1] == 0 < noise["roll"]["sparse"]["alive"]["noise"][-1]
    assert noise["roll"]["sparse seen whole"]["halted"]["noise"][-1] > 0
    assert noise["roll"]["dense"]["alive"]["noise"][0] == noise["roll"]["sparse"]["alive"]["noise"][0]
    assert found["head_variance"]["end"]["sparse none"]["within"] == 0 < found["head_variance"]["end"]["run"]["within"]
    assert set(found["gap"]) == {"run", *found["stability"]} == {"run", *map(" ".join, ARMS)}
    accuracy = run.read_result()["accuracy"]["student"]
    everything = gap(pipeline_model(run), {"test": together._test_images(run.config, 1000, torch.device("cpu"))})
    assert everything["test"]["accuracy"] == pytest.approx(accuracy, abs=0.01)


def pipeline_model(run: RunFolder) -> torch.nn.Module:
    return together.vit_of(run.config.model, together.load_tensors(run.model_path)[0])


def test_without_test_images_or_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pool here is of `pri4` and `drop`, of which only the first two of four images of a canvas are kept."""
    changes = {"evaluate.where": "clients", "inversion.mode": "pri4", "relabel.mode": "drop", "out-dir": str(tmp_path)}
    run = pipeline.run(settings(**changes), "clients")
    found = diagnose(run, FEW)
    assert "relabel_bias" not in found
    assert found["sizes"]["test"] == 0
    assert list(found["gap"]["run"]) == list(found["stability"]["dense none"]["losses"]) == ["pool"]
    (run.path / "diagnostics.json").write_text("[1]")
    assert main(["report", str(run.path)]) == 2
    assert f"run `fedmitr diagnose {run.path}` again" in capsys.readouterr().err
    fused = pipeline.fuse(run, "fedavg", {})
    assert main(["diagnose", str(fused.path)]) == 2
    assert (
        f"no pool.safetensors, on which claims are measured; make one that has: fedmitr fuse {run.path}"
        in capsys.readouterr().err
    )


def test_a_pool_of_density_by_importance_keeps_as_many(run: RunFolder) -> None:
    """What `relabel` leaves of the two pools that are made: as many dense patches in both modes."""
    config = run.config
    pools = [together._images(an_ensemble(config), config, mode, 10, "pool") for mode in ("dense", "sparse")]
    assert {int(pool.dense.sum()) for pool in pools} == {10 * alive_counts(16, config.inversion)[-1]}
    assert [relabel(pool, "drop").positions.shape[1] for pool in pools] == [7, 7]
    assert torch.equal(pools[0].targets, pools[1].targets)
