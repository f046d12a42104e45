"""The README's tables: means and deviations by hand, refused files, and a README that is up to date."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedmitr_flwr.config import Config

ROOT = Path(__file__).parents[1]


def _load() -> ModuleType:
    """benchmarks/ is no package; the script is loaded as it is run."""
    spec = importlib.util.spec_from_file_location("benchmarks_table", ROOT / "benchmarks" / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


results_table = _load()


def facts(**settings: object) -> dict[str, Any]:
    return {
        "fingerprint": "0123456789ab",
        "versions": {"python": "3.11.9", "torch": "2.5.0", "flwr": None},
        "machine": {"device": "cpu", "gpu": None, "cpu": "Example CPU", "cores": 2, "platform": "Linux"},
        "config": Config.from_flat(settings).to_flat(),
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
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n", encoding="utf-8")
    (tmp_path / "results").mkdir()
    return tmp_path


def run(folder: Path, *words: str) -> int:
    status: int = results_table.main([f"--readme={folder / 'README.md'}", f"--results={folder / 'results'}", *words])
    return status


def write(folder: Path, name: str, content: object) -> None:
    (folder / "results" / name).write_text(json.dumps(content), encoding="utf-8")


def test_mean_and_sample_deviation() -> None:
    # mean (50 + 54 + 64) / 3 = 56; squares 36 + 4 + 64 = 104; 104 / (3 - 1) = 52; √52 = 7.211
    assert results_table.spread([50.0, 54.0, 64.0]) == "56.0 ± 7.2 (3)"
    assert results_table.spread([50.0, None]) == "50.0 (1)"
    assert results_table.spread([None]) == "-"


def test_a_study_becomes_a_table(folder: Path) -> None:
    rows = [row(0, 50.0), row(1, 54.0), row(2, 64.0), row(0, 44.0, "none"), row(1, 44.0, "none"), row(2, 44.0, "none")]
    write(folder, "digits.json", a_study(rows))
    assert run(folder) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results -->\n\n### digits, Dirichlet 0.3, 5 clients, small ViT, 8 px\n")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "old" not in text
    assert "| 25.0 ± 0.0 (3) | 40.0 ± 0.0 (3) | 80.0 ± 0.0 (3) |" in text  # the uploads' own, once for each seed
    # 10, 14 and 24 points over FedAvg; 62.5, 67.5 and 80 % of the ensemble: mean 70, √(56.25 + 6.25 + 100) / √2 = 9.01
    assert "| sparse | tokens (default) | 56.0 ± 7.2 (3) | 16.0 ± 7.2 (3) | 70.0 ± 9.0 (3) | 16 ± 0 (3) |" in text
    assert "| sparse | none | 44.0 ± 0.0 (3) | 4.0 ± 0.0 (3) | 55.0 ± 0.0 (3) | 16 ± 0 (3) |" in text
    assert "Command: `python benchmarks/digits.py --seeds 0,1,2`" in text
    assert "Machine: Example CPU, 2 cores. python 3.11.9, torch 2.5.0. Code 0123456789ab." in text


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_table_says_whether_it_is_of_test_or_of_validation_images(folder: Path, share: float) -> None:
    write(folder, "digits.json", a_study([row(0, 50.0)]) | facts(**{"data.validation": share}))
    write(folder, "one.result.json", {"method": "fedmitr", **row(3, 60.0), **facts(**{"data.validation": share})})
    assert run(folder) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    counted = {word: text.count(f"{word} accuracy in percent") for word in ("Test", "Validation")}
    assert counted == ({"Test": 0, "Validation": 2} if share else {"Test": 2, "Validation": 0})


def test_a_single_run_becomes_a_table_behind_the_studies(folder: Path) -> None:
    settings = {"data.source": "parquet", "data.path": "somewhere/fashion_mnist", "partition.alpha": 0.1}
    content = {"method": "fedmitr", **row(3, 60.0), **facts(**settings)}
    write(folder, "a_run.result.json", content)
    write(folder, "fashion_mnist.result.json", content)
    write(folder, "z_study.json", a_study([row(0, 50.0)]))
    assert run(folder) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.index("### digits") < text.index("### fashion_mnist, Dirichlet 0.1, 5 clients")
    assert "| 25.0 (1) | 40.0 (1) | 80.0 (1) | 60.0 (1) | 20.0 (1) | 75.0 (1) | 16 (1) |" in text
    assert "One run, seed 3" in text
    assert "Command: `python scripts/flower_run.py -c configs/fashion_mnist.toml --clients 5`" in text
    assert "Command: settings in the file's `config`, method `fedmitr`" in text
    assert "somewhere" not in text


def test_a_run_without_a_single_model_or_without_a_test_set_has_dashes(folder: Path) -> None:
    content = {"method": "ensemble", **row(0, 60.0), **facts()}
    content["accuracy"] = {"student": 60.0, "fedavg": None, "ensemble": None, "local": []}
    write(folder, "a.result.json", content)
    assert run(folder) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| - | - | - | 60.0 (1) | - | - | 16 (1) |" in text


def test_check_sees_what_is_out_of_date_and_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "digits.json", a_study([row(0, 50.0)]))
    before = (folder / "README.md").read_bytes()
    assert run(folder, "--check") == 1
    assert "out of date; run: python benchmarks/table.py" in capsys.readouterr().err
    assert (folder / "README.md").read_bytes() == before
    assert run(folder) == 0
    written = (folder / "README.md").read_bytes()
    assert run(folder, "--check") == 0
    assert run(folder) == 0
    assert (folder / "README.md").read_bytes() == written


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


def test_a_readme_without_the_marks_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "README.md").write_text("<!-- /results --> <!-- results -->", encoding="utf-8")
    assert run(folder) == 2
    assert "<!-- results -->" in capsys.readouterr().err


def test_the_readme_is_up_to_date() -> None:
    assert results_table.main(["--check"]) == 0
