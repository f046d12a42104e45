"""The speed benchmark: FLOPs against torch's own counter, bounds of the papers' schedules, and what a run writes."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import inversion_speed
import pytest
import timm
import torch
from speed import arms, document, flops, gauges, rows, uploads
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert

SMI = "0.0125,0.025,0.05,0.075"
DEIT_TINY = flops.Shape(depth=12, width=192, attention=192, mlp=2 * 192 * 768, patch=768, prefix=1, classes=1000)
TINY = shlex.split(
    "--model small --img-size 16 --patch-size 4 --set model.width=16 --batch 3 --steps 7 --stops 0.2,0.5 "
    "--modes dense,sparse,pri4 --threads 1 --teachers 2 --repeats 2 --peak-size 64"
)


def a_vit() -> VisionTransformer:
    """Heads and MLP of odd sizes, registers; attention whose two products can be counted."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 7}
    vit = VisionTransformer(**sizes, mlp_ratio=3, reg_tokens=3)
    for block in vit.blocks:
        block.attn.fused_attn = False
    return vit.requires_grad_(False).eval()


def big(mode: str, *, steps: int = 4000, stops: str = SMI) -> Config:
    """224 pixels in patches of 16."""
    sizes = {"model.img-size": 224, "model.patch-size": 16, "model.in-chans": 1, "model.num-classes": 10}
    return Config.from_flat(sizes | {"inversion.mode": mode, "inversion.steps": steps, "inversion.stops": stops})


@pytest.mark.parametrize("mode", ["dense", "sparse", "pri4"])
def test_the_engine_does_what_is_counted(mode: str) -> None:
    """A teacher, three images: what more steps cost, torch's counter against ours. Importance drops out."""
    tiny = {"model.name": "small", "model.img-size": 16, "model.patch-size": 4, "model.in-chans": 3}
    tiny |= {"model.num-classes": 7, "inversion.mode": mode, "inversion.stops": "0.1,0.3"}
    ensemble, shape = Ensemble([a_vit()], torch.ones(1, 7), "probs"), flops.Shape.of(a_vit())
    differences = []
    for steps in (4, 6):
        config = Config.from_flat(tiny | {"inversion.steps": steps})
        with FlopCounterMode(display=False) as counter:
            invert(ensemble, torch.arange(3), config.inversion, config.model, flip=True, rng=stream(0))
        differences.append(counter.get_total_flops() - 3 * shape.run_flops(flops.stages(config)))
    assert differences[0] == differences[1]


def test_stages_by_hand() -> None:
    assert flops.stages(big("dense")) == [(4000, 196)]
    assert flops.stages(big("sparse")) == [(50, 196), (50, 137), (100, 95), (100, 66), (3700, 46)]
    assert flops.stages(big("sparse", stops="")) == [(4000, 196)]
    assert flops.stages(big("pri4", steps=80)) == [(20, 196), (20, 147), (20, 98), (20, 49)]
    quarters = [(steps, 196 - 49 * i) for i, steps in enumerate([20, 21, 20, 21])]  # 20.5, 41, 61.5, 82
    assert flops.stages(big("pri4", steps=82)) == quarters


def test_bounds_of_long_runs() -> None:
    """Linear layers alone: by tokens; attention, which grows with their square, adds to it."""
    assert flops.Shape.of(timm.create_model("deit_tiny_patch16_224")) == DEIT_TINY
    linear = flops.Shape(depth=1, width=8, attention=0, mlp=0, patch=8, prefix=0, classes=0)
    for mode, tokens, about in (("dense", 1, 1), ("sparse", 784_000 / 202_950, 4.41), ("pri4", 4 / (10 / 16), 6.71)):
        assert flops.bound(DEIT_TINY, big(mode), big("dense")) == pytest.approx(about, abs=0.01)
        assert flops.bound(linear, big(mode), big("dense")) == pytest.approx(tokens)


def test_rows_by_hand() -> None:
    """Each arm is compared with its own dense, and a run may finish no image."""
    plan, half, tiny = rows.Plan(10, 2, 6e9, 3.0), rows.Plan(8, 4, 4e9, 3.0), rows.Plan(1, 1, 1.0, 1.0)
    unknown = rows.Run(gauges.Cost(1.0, None, None), ())

    def runs(seconds: Sequence[float], *losses: float) -> list[rows.Run]:
        return [rows.Run(gauges.Cost(each, 90.0, 100.0 + each), losses) for each in seconds]

    found = {
        rows.Arm("dense", 3, 0.0): (runs([3, 1, 2], 0.5, 1.5), plan),
        rows.Arm("pri2", 3, 0.0): (runs([4, 4, 4], 1.0, 2.0, 3.0), half),  # one of four images without a finite loss
        rows.Arm("dense", 5, 0.0): (runs([8.0], 1.0), tiny),
        rows.Arm("pri2", 5, 0.0): ([unknown], tiny),
    }
    told = {arm: rows.row(arm, *own, 1e10) for arm, own in found.items()}
    dense, pri, _, none = rows.with_ratios(told, {arm: 1.5 if arm.mode == "pri2" else 1.0 for arm in found})
    assert (dense["seconds"], dense["seconds_median"], dense["seconds_spread"]) == ([3, 1, 2], 2, [1, 3])
    assert (dense["seconds_per_step"], dense["images"], dense["images_per_second"]) == (0.2, 2, 1.0)
    assert (dense["mfu"], dense["start_mib"], dense["peak_mib"]) == (pytest.approx(0.3), 90, 103)
    assert dense["loss"] == {"mean": 1.0, "min": 0.5, "max": 1.5, "count": 6}
    assert (dense["ratio_to_dense"], dense["bound_fraction"]) == (1, 1)
    assert (pri["images"], pri["images_planned"], pri["seconds_per_step"]) == (3, 4, 0.5)
    assert (pri["ratio_to_dense"], pri["ratio_bound"], pri["bound_fraction"]) == (0.75, 1.5, 0.5)
    assert [none[key] for key in ("images", "images_per_second", "loss", "peak_mib")] == [0, 0, None, None]


def test_owners_by_hand_and_balanced_targets() -> None:
    assert uploads.owned_classes(3, 10) == "0 1 2 3; 3 4 5 6; 6 7 8 9"
    counts = uploads.class_counts(3, 10)
    assert uploads.asked(counts, 0.0) == [3] * 10
    assert uploads.asked(counts, 0.5) == [1, 1, 1, 2, 1, 1, 2, 1, 1, 1]
    first, second = (uploads.draw_targets(25, 10, stream(0, repeat)) for repeat in range(2))
    assert sorted(first.bincount(minlength=10).tolist()) == [2] * 5 + [3] * 5
    assert not torch.equal(first, second)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's mark is Linux's")
def test_the_peak_is_that_of_the_work_alone() -> None:
    device = torch.device("cpu")
    _, large = gauges.measure(lambda: torch.ones(2**24).sum(), device)  # 64 MiB, freed at the end
    _, small = gauges.measure(lambda: torch.ones(2**10).sum(), device)
    assert large.peak_mib - large.start_mib == pytest.approx(64, abs=8)
    assert small.peak_mib - small.start_mib < 8


def test_no_machine_does_more_than_its_seconds_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five products of 10 by 10, one in 1, 2, ... 5 seconds: 2 · 10³ FLOPs in the shortest."""
    clock = iter([0, 5, 5, 9, 9, 12, 12, 14, 14, 15])
    monkeypatch.setattr(gauges, "synchronised", lambda _device: next(clock))
    assert gauges.peak_flops(torch.device("cpu"), 10) == 2000


def test_a_short_run_shows_every_stage_of_the_long_one() -> None:
    words = [*TINY, "--json", "out.json", "--steps", "83", "--stops", "0.1,0.9,0.95"]
    asked = inversion_speed.parser().parse_args(words)
    dense, sparse, pri = (rows.Arm(mode, 1, 0.0) for mode in ("dense", "sparse", "pri4"))
    assert (arms.short_steps(dense, asked), arms.short_steps(pri, asked)) == (1, 4 + 3)
    steps = arms.short_steps(sparse, asked)
    assert steps < 20
    long, short = (flops.stages(arms.config_of(sparse, asked, length)) for length in (83, steps))
    assert [stage.alive for stage in short] == [stage.alive for stage in long]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inversion_speed.main([*TINY, "--json", str(tmp_path / "new" / "out.json")]) == 0
    content = json.loads((tmp_path / "new" / "out.json").read_text(encoding="utf-8"))
    dense, sparse, pri = found = content["rows"]
    assert [row["mode"] for row in found] == ["dense", "sparse", "pri4"]
    assert [row["images"] for row in found] == [row["images_planned"] for row in found] == [3, 3, 12]
    assert [row["loss"]["count"] for row in found] == [6, 6, 24]
    for row in found:
        assert row["ratio_bound"] == pytest.approx(row["images"] / row["flops"] * dense["flops"] / dense["images"])
    assert dense["ratio_to_dense"] == dense["ratio_bound"] == 1
    assert 1 < sparse["ratio_bound"] < pri["ratio_bound"]
    assert str(tmp_path) not in json.dumps(content)
    told = capsys.readouterr().out
    assert told.count("repeat ") == 6
    assert "\n".join(document.section(content)) in told


def test_steps_that_are_not_counted_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = flops.stages
    monkeypatch.setattr(arms, "stages", lambda config: [*stages(config), flops.Stage(1, 5)])
    with pytest.raises(RuntimeError, match=r"dense K=2: steps by alive patches are \{16: 1\}"):
        inversion_speed.main([*TINY, "--modes", "dense", "--json", str(tmp_path / "out.json")])
    assert not list(tmp_path.iterdir())


def test_what_is_not_possible_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, told in (
        (["--modes", "sparse"], "--modes has no dense"),
        (["--modes", "dense,pri7"], "inversion.mode = 'pri7' is not possible; use dense | sparse | pri4"),
        (["--steps", "3", "--modes", "dense,pri4"], "inversion.mode = 'pri4' needs 4 patches and steps"),
        (["--img-size", "15"], "model.img-size = 15 is not possible"),
        (["--route", "2"], "inversion.route = 2.0 is not possible"),
        (["--set", "inversion.tw=1"], "unknown config key 'inversion.tw'"),
    ):
        assert inversion_speed.main([*TINY, *more, "--json", str(tmp_path / "out.json")]) == 2
        printed = capsys.readouterr()
        assert told in printed.err
        assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_the_command_names_no_folder_of_the_machine() -> None:
    words = ["--weights", "/home/me/nets/vit/model.safetensors", "--set=data.path=/home/me/data", "--json", "out.json"]
    told = "python benchmarks/inversion_speed.py --weights vit/model.safetensors --set=data.path=me/data "
    assert inversion_speed.command([*words, "--route", "0,0.5"]).startswith(told)
