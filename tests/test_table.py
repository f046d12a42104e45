"""Tables of README.md and docs/: figures by hand, refused files, and documents that are up to date."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import bench_fakes
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # no package: it is where the script runs

import table as results_table

from fedmitr_flwr.bench.markup import spread
from fedmitr_flwr.bench.results import save
from fedmitr_flwr.config import Config

ROOT = Path(__file__).parents[1]


def facts(**settings: object) -> dict[str, Any]:
    return {
        "fingerprint": "0123456789ab",
        "versions": {"python": "3.11.9", "torch": "2.5.0", "flwr": None},
        "machine": {"device": "cpu", "gpu": None, "cpu": "Example CPU", "cores": 2, "platform": "Linux"},
        "config": Config.from_flat({"data.source": "digits", "model.img-size": 8, **settings}).to_flat(),
    }


def row(seed: int, student: float, relabel: str = "tokens", fedavg: float = 40.0) -> dict[str, Any]:
    return {
        "seed": seed,
        "inversion.mode": "sparse",
        "relabel.mode": relabel,
        "accuracy": {"student": student, "fedavg": fedavg, "ensemble": 80.0, "local": [20.0, None, 30.0]},
        "seconds": {"inversion": 10.0, "distillation": 5.5},
    }


def a_study(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"command": "python benchmarks/digits.py --seeds 0,1,2", **facts(), "rows": rows}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    marks = {"README.md": ["glance"], "results.md": ["studies", "bench", "ablation"]}
    marks |= {"performance.md": ["speed", "routing"], "security.md": ["hostile", "privacy"]}
    for name, blocks in marks.items():
        text = "".join(f"before\n<!-- {mark} -->\nold\n<!-- /{mark} -->\nafter\n" for mark in blocks)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for results in ("speed", "routing", "bench", "security", "privacy", "ablation"):
        (tmp_path / "results" / results).mkdir(parents=True)
    return tmp_path


def run(folder: Path, *words: str) -> int:
    return results_table.main(
        [f"--readme={folder / 'README.md'}", f"--docs={folder}", f"--results={folder / 'results'}", *words]
    )


def write(folder: Path, name: str, content: object) -> None:
    (folder / "results" / name).write_text(json.dumps(content), encoding="utf-8")


def test_mean_and_sample_deviation() -> None:
    # mean (50 + 54 + 64) / 3 = 56; squares 36 + 4 + 64 = 104; 104 / (3 - 1) = 52; √52 = 7.211
    assert spread([50.0, 54.0, 64.0]) == "56.0 ± 7.2 (3)"
    assert spread([50.0, None]) == "50.0 (1)"
    assert spread([None]) == "-"


def test_a_study_becomes_a_line_and_its_grid_a_table(folder: Path) -> None:
    rows = [row(0, 50.0), row(1, 54.0), row(2, 64.0), row(0, 44.0, "none"), row(1, 44.0, "none"), row(2, 44.0, "none")]
    write(folder, "digits.json", a_study(rows))
    assert run(folder) == 0
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- studies -->\n\nSeeds 0, 1, 2; test accuracy in percent, last epoch, ")
    assert "<!-- /studies -->\nafter\n" in text
    assert "old" not in text
    # clients alone and FedAvg once for each seed; 62.5, 67.5 and 80 % of the ensemble: mean 70, √162.5 / √2 = 9.01
    own = "80.0 ± 0.0 (3) | 56.0 ± 7.2 (3) | 70.0 ± 9.0 (3) | 16 ± 0 (3) |"
    assert f"| digits, Dirichlet 0.3 | 25.0 ± 0.0 (3) | 40.0 ± 0.0 (3) | {own}" in text
    assert f"| sparse | tokens (default) | {own}" in text
    assert "| sparse | none | 80.0 ± 0.0 (3) | 44.0 ± 0.0 (3) | 55.0 ± 0.0 (3) | 16 ± 0 (3) |" in text
    assert "Commands: `python benchmarks/digits.py --seeds 0,1,2`." in text
    assert "Machine: Example CPU, 2 cores. python 3.11.9, torch 2.5.0. Code 0123456789ab." in text

    readme = (folder / "README.md").read_text(encoding="utf-8")
    shown = "25.0 ± 0.0 (3) | 40.0 ± 0.0 (3) | - | 56.0 ± 7.2 (3) | 70.0 ± 9.0 (3) | - |"
    assert f"| digits, Dirichlet 0.3 | {shown}" in readme


def test_ensembles_by_other_weights_have_a_table(folder: Path) -> None:
    rows = [row(seed, 50.0) | {"ensembles": {"uniform": 60.0 + 2 * seed, "counts": 70.0}} for seed in (0, 1)]
    write(folder, "digits.json", a_study(rows))
    assert run(folder) == 0
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "| Setting | uniform | counts |\n" in text
    assert "| digits, Dirichlet 0.3 | 61.0 ± 1.4 (2) | 70.0 ± 0.0 (2) |\n" in text
    assert "| Inversion |" not in text  # one pair of inversion and relabelling is no grid


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_table_says_whether_it_is_of_test_or_of_validation_images(folder: Path, share: float) -> None:
    write(folder, "digits.json", a_study([row(0, 50.0)]) | facts(**{"data.validation": share}))
    assert run(folder) == 0
    text = (folder / "results.md").read_text(encoding="utf-8")
    counted = {word: text.count(f"{word} accuracy in percent") for word in ("test", "validation")}
    assert counted == ({"test": 0, "validation": 1} if share else {"test": 1, "validation": 0})


def test_check_sees_what_is_out_of_date_and_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "digits.json", a_study([row(0, 50.0)]))
    before = (folder / "results.md").read_bytes()
    assert run(folder, "--check") == 1
    assert "out of date; run: python benchmarks/table.py" in capsys.readouterr().err
    assert (folder / "results.md").read_bytes() == before
    assert run(folder) == 0
    written = (folder / "results.md").read_bytes()
    assert run(folder, "--check") == 0
    assert run(folder) == 0
    assert (folder / "results.md").read_bytes() == written


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "bad.json: not JSON"),
        ('{"rows": [{}]}', "bad.json: no 'config'"),
        (json.dumps(a_study([row(0, 50.0), row(0, 50.0, "none", fedavg=41.0)])), "seed 0 are not of the same uploads"),
    ],
)
def test_a_bad_file_is_named(folder: Path, text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "results" / "bad.json").write_text(text, encoding="utf-8")
    assert run(folder) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "mark"),
    [("README.md", "glance"), ("results.md", "bench"), ("performance.md", "speed"), ("performance.md", "routing")],
)
def test_a_document_without_the_marks_is_refused(
    folder: Path, document: str, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (folder / document).read_text(encoding="utf-8")
    (folder / document).write_text(text.replace(f"<!-- /{mark} -->", ""), encoding="utf-8")
    assert run(folder) == 2
    assert f"{document} has no <!-- {mark} -->" in capsys.readouterr().err
    assert "old" in "".join((folder / name).read_text(encoding="utf-8") for name in ("README.md", "performance.md"))


def speed_row(mode: str = "dense", **other: Any) -> dict[str, Any]:
    """100 steps of dense inversion: 8 images in 20 seconds, at half of the peak."""
    settings = {"mode": mode, "teachers": 2, "route": 0.0, "precision": "float32", "teacher_chunk": 0, "compile": False}
    size = {"img_size": 96, "patches": 36, "batch": 8, "steps": 100, "images": 8, "teachers_each": 2.0}
    seconds = {"seconds": [20.0, 19.04, 21.06], "seconds_median": 20.0, "seconds_spread": [19.04, 21.06]}
    ratios = {"images_per_second": 0.4, "ratio_to_dense": 1.0, "ratio_bound": 1.0, "bound_fraction": 1.0, "mfu": 0.5}
    costs = {"start_mib": 800.4, "peak_mib": 1100.6, "loss": {"mean": 0.16828, "min": 0.1, "max": 0.2, "count": 24}}
    return settings | size | seconds | ratios | costs | other


def speeds(*rows: dict[str, Any]) -> dict[str, Any]:
    content = {"command": "python benchmarks/inversion_speed.py --teachers 2", "model": "deit", "rows": rows}
    return facts() | content | {"peak_flops": {"float32": 367.6e9}}


def performance(folder: Path) -> str:
    assert run(folder) == 0
    return (folder / "performance.md").read_text(encoding="utf-8")


def test_speeds_become_a_table(folder: Path) -> None:
    ratios = {"ratio_to_dense": 12.264, "ratio_bound": 13.062, "bound_fraction": 0.9389, "images_per_second": 4.9056}
    pri = {"seconds_median": 11.4155, "seconds_spread": [11.0, 1234.5], "images": 56, "mfu": 0.4694}
    unknown = {"loss": None, "peak_mib": None, "start_mib": None}
    write(folder, "speed/b.json", speeds(speed_row(), speed_row("pri7", **ratios, **pri, **unknown)))
    write(folder, "speed/a.json", speeds(speed_row(img_size=224, patches=196, seconds=[20.0])))
    text = performance(folder)
    assert text.startswith(
        "before\n<!-- speed -->\n\n### deit, 224 px, 196 patches, 8 targets, T = 100, K = 2\n\nOne run."
    )
    assert "<!-- /speed -->\nafter\n" in text
    assert "### deit, 96 px, 36 patches, 8 targets, T = 100, K = 2\n\nMedians of 3 runs." in text
    assert (
        "| K | Mode | Images | Seconds (min, max) | Images/s | × dense | Bound | Of the bound | MFU | Peak MiB" in text
    )
    assert "| 2 | dense | 8 | 20 (19, 21.1) | 0.4 | 1 | 1 | 100 % | 50 % | 1101 (800) | 0.168 |" in text
    assert "| 2 | pri7 | 56 | 11.4 (11, 1234) | 4.91 | 12.3 | 13.1 | 94 % | 47 % | - | - |" in text
    assert "A large product of matrices: 368 GFLOP/s (float32)." in text
    assert "Command: `python benchmarks/inversion_speed.py --teachers 2`" in text
    assert "Machine: Example CPU, 2 cores. python 3.11.9, torch 2.5.0. Code 0123456789ab." in text
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n<!-- glance -->\n\nNo results are committed yet.\n\n<!-- /glance -->\nafter\n")


def test_settings_are_shown_where_rows_of_as_many_teachers_differ(folder: Path) -> None:
    one = speed_row(teachers=1, teachers_each=1.0)
    write(folder, "speed/a.json", speeds(one, speed_row()))
    text = performance(folder)
    assert ", K = 1, 2\n" in text
    assert "| Loss |\n" in text
    write(folder, "speed/a.json", speeds(one, speed_row(), speed_row(route=0.5, teachers_each=1.25, compile=True)))
    text = performance(folder)
    assert "| Loss | Route | Teachers asked | Compiled |\n" in text
    assert "| 0.168 | 0 | 1 | False |\n" in text
    assert "| 0.168 | 0.5 | 1.25 | True |\n" in text


def routed(seed: int, weights: str, threshold: float, asked: float, student: float) -> dict[str, Any]:
    arm = {"seed": seed, "ensemble.weights": weights, "inversion.route": threshold, "teachers_asked": asked}
    return arm | {"accuracy": {"student": student, "ensemble": 60.0}, "seconds": {"inversion": 100 * asked}}


def test_routes_become_a_table(folder: Path) -> None:
    rows = [routed(seed, "counts", 0.1, 0.25, 40.0 + 2 * seed) for seed in (0, 1)] + [
        routed(0, "counts", 0.0, 1.0, 41.0)
    ]
    content = {
        "command": "python benchmarks/routing.py --seeds 0,1",
        **facts(**{"partition.clients": 10}),
        "rows": rows,
    }
    write(folder, "routing/a.json", content)
    text = performance(folder)
    assert "digits, Dirichlet 0.3, 10 clients, seeds 0, 1; mean ± sample standard deviation." in text
    assert "| counts | 0.1 | 25.0 ± 0.0 | 41.0 ± 1.4 | 60.0 ± 0.0 | 25.0 ± 0.0 |" in text
    assert "| counts | 0 | 100.0 | 41.0 | 60.0 | 100.0 |" in text
    assert text.endswith("Code 0123456789ab.\n\n<!-- /routing -->\nafter\n")


def test_a_bad_file_of_routes_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "routing/bad.json", {"rows": []})
    assert run(folder) == 2
    assert "bad.json: not a file of benchmarks/routing.py" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "{}", json.dumps(speeds()), json.dumps(speeds({}))])
def test_a_bad_file_of_speeds_is_named(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "results" / "speed" / "bad.json").write_text(text, encoding="utf-8")
    assert run(folder) == 2
    assert "bad.json: not a file of benchmarks/inversion_speed.py" in capsys.readouterr().err


def test_check_sees_either_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    write(folder, "speed/a.json", speeds(speed_row()))
    assert run(folder, "--check") == 1
    told = capsys.readouterr().err
    assert "performance.md is out of date; run: python benchmarks/table.py" in told
    assert "README.md" not in told
    assert "No measurements are committed yet." in (folder / "performance.md").read_text(encoding="utf-8")
    assert run(folder) == run(folder, "--check") == 0


def test_the_documents_are_up_to_date() -> None:
    assert results_table.main(["--check"]) == 0


def test_no_committed_command_names_a_folder_of_a_machine() -> None:
    found = sorted((ROOT / "benchmarks" / "results" / "speed").glob("*.json"))
    assert found
    for path in found:
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        assert not re.search(r"(?:^|[\s='\"])[/~]|[A-Za-z]:\\", command), f"{path.name}: {command}"


def ablated(seed: int, changes: dict[str, Any], student: float) -> dict[str, Any]:
    accuracy = {"student": student, "fedavg": 40.0, "ensemble": 80.0}
    row = {"seed": seed, "part": "Images", "changes": changes, "accuracy": accuracy, "agreement": 90.0}
    return row | {"seconds": {"inversion": 12.5}}


def test_an_ablation_becomes_a_table_of_paired_differences(folder: Path) -> None:
    """Seed by seed 2 and 6 points more than the defaults: 4.0 ± 2.8, although both spread more than that."""
    rows = [ablated(seed, {}, 50.0 + 10 * seed) for seed in (0, 1)]
    rows += [ablated(seed, {"distill.shift": True}, student) for seed, student in ((0, 52.0), (1, 66.0))]
    write(folder, "ablation/a.json", {"command": "python benchmarks/ablation.py", **facts(), "rows": rows})
    assert run(folder) == 0
    text = (folder / "results.md").read_text(encoding="utf-8")
    shared = "80.0 | 40.0 | 90.0 | 12 |"
    assert f"| `unchanged` | 55.0 ± 7.1 (2) | 0.0 ± 0.0 (2) | {shared}\n| *Images* |" in text
    assert f"| `distill.shift = true` | 59.0 ± 9.9 (2) | 4.0 ± 2.8 (2) | {shared}" in text


def test_a_bench_becomes_a_section_with_one_picture_and_lines_of_the_readme(folder: Path) -> None:
    share = {"accuracy": {"student": 50.0, "fedavg": 40.0, "ensemble": 80.0, "local": [20.0, None, 30.0, 40.0]}}
    told = {"worst_class": 40.0, "per_class": {"cat": 60.0, "dog": 40.0}}
    entry = bench_fakes.an_entry("fedmitr", 50.0)
    entry["accuracy"] = share["accuracy"] | told
    made = bench_fakes.results([entry, bench_fakes.an_entry("lda", 60.0)])
    bench = folder / "results" / "bench" / "cpu"
    (bench / "figures").mkdir(parents=True)
    save(made, bench / "results.jsonl")
    for name in ("digits-K4-bytes", "digits-K4-recall-iid"):
        (bench / "figures" / f"{name}.png").touch()
    (folder / "results" / "bench" / "smoke").mkdir()  # a trial: every method once, and no numbers to compare
    save(made, folder / "results" / "bench" / "smoke" / "results.jsonl")
    assert run(folder) == 0
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "<!-- bench -->\n\n### digits, 4 clients, small ViT, 8 px\n" in text
    assert text.count("| `lda` | **60.0 (1)** |") == 1
    assert "partitions and seeds: `fedmitr` 2 (2), `lda` 2 (2)." in text  # 2 seconds of the server; 1 and 3 MB up
    path = "../benchmarks/results/bench/cpu/figures/digits-K4"
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == [f"{path}-bytes.png"]
    assert "Command: `fedmitr bench configs/bench/cpu.toml`\n\nMachine: Abacus, 2 cores." in text

    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "| digits, Dirichlet 0.3 | 30.0 (1) | 40.0 (1) | - | 50.0 (1) | 62.5 (1) | 60.0 (1) |" in readme

    (folder / "results" / "bench" / "other").mkdir()
    (folder / "results" / "bench" / "other" / "results.jsonl").write_text("{}")
    assert run(folder) == 2
