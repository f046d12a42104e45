"""Scripts of benchmarks/: tables by hand, refused files, documents that are up to date, attacks and class sets."""

import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import bench_fakes
import pytest
import table as results_table
import theory
import torch
from cifar100_sets import COARSE, FINE, SUPERCLASSES, classes_of, subset
from datasets import ClassLabel, Dataset, Features, Value
from security import attacks, document
from tiny import ROOT, same, settings

from deploy import demo
from fedmitr_flwr import pipeline
from fedmitr_flwr.bench.results import save
from fedmitr_flwr.config import Config
from fedmitr_flwr.vit.build import initial_weights

FAULTS = runpy.run_path(str(ROOT / "benchmarks" / "faults.py"))  # the name `faults` is tests/faults.py
DOCUMENTS = {"README.md": ["glance"], "results.md": ["studies", "bench", "ablation"]}
DOCUMENTS |= {
    "performance.md": ["speed", "routing"],
    "security.md": ["hostile", "inference", "privacy"],
    "theory.md": ["theory"],
}


class Folder:
    """Documents with empty blocks, and the results that they are filled from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name, blocks in DOCUMENTS.items():
            text = "".join(f"before\n<!-- {mark} -->\nold\n<!-- /{mark} -->\nafter\n" for mark in blocks)
            (path / name).write_text(text, encoding="utf-8")

    def run(self, *words: str) -> int:
        places = {"readme": self.path / "README.md", "docs": self.path, "results": self.path / "results"}
        return results_table.main([*(f"--{name}={path}" for name, path in places.items()), *words])

    def write(self, name: str, content: object) -> None:
        path = self.path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    def read(self, name: str) -> str:
        return (self.path / name).read_text(encoding="utf-8")

    def made(self, name: str) -> str:
        assert self.run() == 0
        return self.read(name)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def facts(**settings: object) -> dict[str, Any]:
    return {
        "fingerprint": "0123456789ab",
        "versions": {"python": "3.11.9", "torch": "2.5.0", "flwr": None},
        "machine": {"device": "cpu", "gpu": None, "cpu": "Example CPU", "cores": 2, "platform": "Linux"},
        "config": Config.from_flat({"data.source": "digits", "model.img-size": 8, **settings}).to_flat(),
    }


def row(seed: int, student: float, relabel: str = "tokens", fedavg: float = 40.0) -> dict[str, Any]:
    accuracy = {"student": student, "fedavg": fedavg, "ensemble": 80.0, "local": [20.0, None, 30.0]}
    told = {"seed": seed, "inversion.mode": "sparse", "relabel.mode": relabel, "accuracy": accuracy}
    return told | {"seconds": {"inversion": 10.0, "distillation": 5.5}}


def a_study(rows: list[dict[str, Any]], **settings: object) -> dict[str, Any]:
    return {"command": "python benchmarks/digits.py --seeds 0,1,2", **facts(**settings), "rows": rows}


def test_a_study_becomes_a_line_and_its_grid_a_table(folder: Folder) -> None:
    rows = [row(seed, student) for seed, student in enumerate((50.0, 54.0, 64.0))]
    folder.write("digits.json", a_study([*rows, *(row(seed, 44.0, "none") for seed in range(3))]))
    text = folder.made("results.md")
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
    shown = "25.0 ± 0.0 (3) | 40.0 ± 0.0 (3) | - | 56.0 ± 7.2 (3) | 70.0 ± 9.0 (3) | - |"
    assert f"| digits, Dirichlet 0.3 | {shown}" in folder.read("README.md")


def test_a_study_on_validation_images_with_other_ensembles(folder: Folder) -> None:
    rows = [row(seed, 50.0) | {"ensembles": {"uniform": 60.0 + 2 * seed, "counts": 70.0}} for seed in (0, 1)]
    folder.write("digits.json", a_study(rows, **{"data.validation": 0.2}))
    text = folder.made("results.md")
    assert "Seeds 0, 1; validation accuracy in percent" in text
    assert "test accuracy" not in text
    assert "| Setting | uniform | counts |\n" in text
    assert "| digits, Dirichlet 0.3 | 61.0 ± 1.4 (2) | 70.0 ± 0.0 (2) |\n" in text
    assert "| Inversion |" not in text  # one pair of inversion and relabelling is no grid


def test_check_sees_what_is_out_of_date_and_changes_nothing(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No measurements are committed yet." in folder.made("performance.md")
    before = {name: folder.read(name) for name in DOCUMENTS}
    assert "<!-- glance -->\n\nNo results are committed yet.\n\n<!-- /glance -->" in before["README.md"]
    folder.write("speed/a.json", speeds(speed_row()))
    assert folder.run("--check") == 1
    told = capsys.readouterr().err
    assert "performance.md is out of date; run: python benchmarks/table.py" in told
    assert "README.md" not in told
    assert before == {name: folder.read(name) for name in DOCUMENTS}
    written = folder.made("performance.md")
    assert folder.run("--check") == 0
    assert folder.made("performance.md") == written


def test_a_document_without_its_marks_is_refused(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    for name, mark in ((name, mark) for name, marks in DOCUMENTS.items() for mark in marks):
        text = folder.read(name)
        (folder.path / name).write_text(text.replace(f"<!-- /{mark} -->", ""), encoding="utf-8")
        assert folder.run() == 2
        assert f"{name} has no <!-- {mark} -->" in capsys.readouterr().err
        (folder.path / name).write_text(text, encoding="utf-8")
        assert all("old" in folder.read(name) for name in DOCUMENTS)


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


def test_speeds_become_a_table(folder: Folder) -> None:
    ratios = {"ratio_to_dense": 12.264, "ratio_bound": 13.062, "bound_fraction": 0.9389, "images_per_second": 4.9056}
    pri = {"seconds_median": 11.4155, "seconds_spread": [11.0, 1234.5], "images": 56, "mfu": 0.4694}
    unknown = {"loss": None, "peak_mib": None, "start_mib": None}
    folder.write("speed/b.json", speeds(speed_row(), speed_row("pri7", **ratios, **pri, **unknown)))
    folder.write("speed/a.json", speeds(speed_row(img_size=224, patches=196, seconds=[20.0])))
    text = folder.made("performance.md")
    section = "### deit, 224 px, 196 patches, 8 targets, T = 100, K = 2\n\nOne run."
    assert text.startswith(f"before\n<!-- speed -->\n\n{section}")
    assert "### deit, 96 px, 36 patches, 8 targets, T = 100, K = 2\n\nMedians of 3 runs." in text
    assert "| K | Mode | Images | Seconds (min, max) | Images/s | × dense | Bound | Of the bound | MFU | Peak" in text
    assert "| 2 | dense | 8 | 20 (19, 21.1) | 0.4 | 1 | 1 | 100 % | 50 % | 1101 (800) | 0.168 |" in text
    assert "| 2 | pri7 | 56 | 11.4 (11, 1234) | 4.91 | 12.3 | 13.1 | 94 % | 47 % | - | - |" in text
    assert "A large product of matrices: 368 GFLOP/s (float32)." in text
    assert "Command: `python benchmarks/inversion_speed.py --teachers 2`\n\nMachine: Example CPU, 2 cores." in text


OTHER_UPLOADS = a_study([row(0, 50.0), row(0, 50.0, "none", fedavg=41.0)])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("bad.json", "{", "bad.json: not JSON"),
        ("bad.json", {"rows": [{}]}, "bad.json: no 'config'"),
        ("bad.json", OTHER_UPLOADS, "seed 0 are not of the same uploads"),
        ("routing/bad.json", {"rows": []}, "bad.json: not a file of benchmarks/routing.py"),
        ("speed/bad.json", "{", "bad.json: not a file of benchmarks/inversion_speed.py"),
        ("speed/bad.json", speeds(), "bad.json: not a file of benchmarks/inversion_speed.py"),
        ("speed/bad.json", speeds({}), "bad.json: not a file of benchmarks/inversion_speed.py"),
        ("bench/bad/results.jsonl", "{}", "cannot read the bench folder or results.jsonl"),
    ],
)
def test_a_bad_file(folder: Folder, name: str, content: object, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write(name, content)
    assert folder.run() == 2
    assert told in capsys.readouterr().err


def test_an_ablation_becomes_a_table_of_paired_differences(folder: Folder) -> None:
    """Seed by seed 2 and 6 points more than the defaults: 4.0 ± 2.8, although both spread more than that."""
    students = ({}, 50.0), ({}, 60.0), ({"distill.shift": True}, 52.0), ({"distill.shift": True}, 66.0)
    common = {"part": "Images", "agreement": 90.0}
    rows = [row(at % 2, student) | common | {"changes": changes} for at, (changes, student) in enumerate(students)]
    folder.write("ablation/a.json", {"command": "python benchmarks/ablation.py", **facts(), "rows": rows})
    text = folder.made("results.md")
    shared = "80.0 | 40.0 | 90.0 | 16 |"
    assert f"| `unchanged` | 55.0 ± 7.1 (2) | 0.0 ± 0.0 (2) | {shared}\n| *Images* |" in text
    assert f"| `distill.shift = true` | 59.0 ± 9.9 (2) | 4.0 ± 2.8 (2) | {shared}" in text


def test_a_bench_becomes_a_section_with_one_picture_and_lines_of_the_readme(folder: Folder) -> None:
    entry = bench_fakes.an_entry("fedmitr", 50.0)
    entry["accuracy"] |= {"fedavg": 40.0, "ensemble": 80.0}
    bench = folder.path / "results" / "bench"
    for name in ("digits-K4-accuracy", "digits-K4-recall-iid"):
        folder.write(f"bench/cpu/figures/{name}.png", "")
    (bench / "smoke").mkdir()  # a trial: every method once, and no numbers to compare
    for name in ("cpu", "smoke"):
        save(bench_fakes.results([entry, bench_fakes.an_entry("lda", 60.0)]), bench / name / "results.jsonl")
    text = folder.made("results.md")
    assert "<!-- bench -->\n\n### digits, 4 clients, small ViT, 8 px\n" in text
    assert text.count("| `lda` | **60.0 (1)** |") == 1
    assert "partitions and seeds: `fedmitr` 2 (2), `lda` 2 (2)." in text  # 2 seconds of the server; 1 and 3 MB up
    path = "../benchmarks/results/bench/cpu/figures/digits-K4"
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == [f"{path}-accuracy.png"]
    assert "Command: `fedmitr bench configs/bench/cpu.toml`\n\nMachine: Abacus, 2 cores." in text
    line = "| digits, Dirichlet 0.3 | 30.0 (1) | 40.0 (1) | - | 50.0 (1) | 62.5 (1) | 60.0 (1) |"
    assert line in folder.read("README.md")


def test_the_documents_are_up_to_date_and_every_fault_was_tried() -> None:
    assert results_table.main(["--check"]) == 0
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert text == FAULTS["document"]()
    faults = "SuperNode killed, ClientApp process killed, client raises, client slower than, SuperLink restarted, "
    faults += "ServerApp killed while uploads come in, ServerApp killed in inversion, ServerApp killed in distillation"
    assert all(fault in text for fault in (*faults.split(", "), "disk of the run folder full", "Ray actor killed"))


def test_no_committed_result_names_a_folder_of_a_machine() -> None:
    folder = re.compile(r"(?:[\s='\"`(])(?:/(?:tmp|home|root|work|data|mnt|var)/|~)|[A-Za-z]:\\\\")
    found = sorted((ROOT / "benchmarks" / "results").rglob("*.json*"))
    assert found
    for path in found:
        assert not folder.search(path.read_text(encoding="utf-8")), path


def test_attacks_on_the_update_and_on_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    start = initial_weights(config.model, config.seed)
    upload = pipeline.train_client(config, 1, start)
    scaled, reversed_ = (attack(upload, config).weights for attack in (attacks.scaled, attacks.reversed_))
    for name, before in start.items():
        update = upload.weights[name] - before
        torch.testing.assert_close(scaled[name] - before, 100 * update, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(reversed_[name] - before, -update, atol=1e-6, rtol=1e-5)
    drawn = [attacks.random(upload, config).weights["head.weight"] for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], start["head.weight"])
    permuted, draw = attacks.permuted(upload, config), torch.randperm
    assert not torch.equal(permuted.weights["head.weight"], upload.weights["head.weight"])
    # With the labels as they were, the same call gives the honest upload.
    monkeypatch.setattr(torch, "randperm", lambda n, **how: torch.arange(10) if n == 10 else draw(n, **how))
    assert same(attacks.permuted(upload, config).weights, upload.weights)


def test_the_hostile_table() -> None:
    cells = [(0, "none", 0, 80.0, []), (1, "none", 0, 82.0, [7])]
    cells += [(0, "scaled", 2, 10.0, [0, 1]), (1, "scaled", 2, 12.0, [1, 4, 5])]
    keys = ("seed", "attack", "hostile", "accuracy", "excluded")
    rows = [dict(zip(keys, cell, strict=True)) for cell in cells]
    rows = [row | {"accuracy": dict.fromkeys(document.DEFENCES, row["accuracy"])} for row in rows]
    text = document._hostile({"command": "python benchmarks/x.py", **facts(), "rows": rows})
    columns = len(document.DEFENCES)
    assert f"| none {'| 81.0 ± 1.4 (2) ' * columns}| 0 of 0, 1 |" in text
    assert f"| 2 scaled {'| 11.0 ± 1.4 (2) ' * columns}| 3 of 4, 2 |" in text
    assert text[0].startswith("Seeds 0, 1; ")
    assert "Command: `python benchmarks/x.py`" in text


def test_the_tables_of_attacks_on_privacy() -> None:
    alone = {"loss": {"auc": 60.0, "found": 2.0}, "lira": {"auc": 70.0, "found": 4.0}, "own": 90.0, "others": 80.0}
    rows: list[dict[str, Any]] = [{"seed": seed, "images": 50, "epsilon": 0.0, **alone} for seed in (0, 1)]
    rows[0]["sums"], rows[1]["own"] = {"auc": 91.0, "found": 50.0}, 92.0
    text = document._inference({"command": "python benchmarks/x.py", **facts(), "rows": rows})
    cells = "91.0 ± 1.4 (2) | 80.0 ± 0.0 (2) | 60.0 ± 0.0 (2); 2.0 ± 0.0 (2) | 70.0 ± 0.0 (2); 4.0 ± 0.0 (2)"
    assert f"| 50 | - | {cells} | 91.0 (1); 50.0 (1) |" in text
    near = {"auc": 51.0, "found": 1.0, "returned": 49.0, "class": 0.5}
    run = {"seed": 0, "inversion": "sparse", "epsilon": 8.0, **alone, "pixels": near, "features": near | {"auc": 52.0}}
    text = document._inference({"command": "python benchmarks/x.py", **facts(), "rows": [run]})
    cells = "60.0 (1); 2.0 (1) | 51.0 (1); 1.0 (1) | 52.0 (1); 1.0 (1) | 49.0 (1) | 49.0 (1)"
    assert f"| sparse | 8 | 90.0 (1) | 80.0 (1) | {cells} |" in text


def test_the_verdict_on_a_claim_by_hand() -> None:
    """Of logarithms 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3), t of 2 degrees of freedom 4.3027."""
    ratios = [math.exp(-value) for value in (0.1, 0.2, 0.3)]
    assert theory.verdict(ratios) == ("0.64 to 1.05", "not seen")
    assert theory.verdict([math.exp(-value) for value in (0.19, 0.2, 0.21)]) == ("0.80 to 0.84", "holds")
    assert theory.verdict([math.exp(value) for value in (0.19, 0.2, 0.21)]) == ("1.19 to 1.25", "fails")
    assert theory.verdict([0.5]) == ("-", "not decided")


def test_the_table_of_claims() -> None:
    pairs = {claim.name: [1.0, 2.0] for each in theory.CLAIMS.values() for claim in each}
    rows: list[dict[str, Any]] = [{"seed": seed, "pairs": pairs} for seed in (0, 1)]
    rows += [{"seed": seed, "arm": "sparse tokens", "student": 80.0 + seed, "ensemble": 90.0} for seed in (0, 1)]
    text = theory.section({"title": "digits", "command": "python benchmarks/x.py", **facts(), "rows": rows})
    assert "| gap: sparse tokens / sparse none | 0.50 ± 0.00 (2) | 0.50 to 0.50 | holds |" in text
    assert "| sparse | - | 80.5 ± 0.7 (2) |" in text
    assert theory.value({"a": {"b": [1, 2]}}, "a/b") == 2.0


def fault(name: str, **other: Any) -> dict[str, Any]:
    row = {"fault": name, "reads": [], "disk": [], "status": 1, "goes_on": "resume-from", "asked": ["b"]}
    return row | {"trained": ["a", "b", "b"], "same_bits": True, "code": "0123456789ab"} | other


def test_a_fault_becomes_a_line() -> None:
    disk = ["config.toml", "metrics.jsonl", "uploads/client_0.safetensors", "work/images-0-0.safetensors"]
    flower_s = ["Exit Code: 201", "client 1 failed", "1 of 2 uploads are in RUN/uploads and 2 are needed"]
    rows = [
        fault("nothing"),
        fault("disk full", reads=["client 1:  no room | wait", "again"], disk=disk),
        fault("restart", disk=["config.toml", "result.json"], asked=[], trained=[]),
        fault("killed", reads=flower_s, disk=["config.toml"], asked=["a", "b"], trained=["b", "a"]),
    ]
    assert FAULTS["fault_lines"](rows)[2:] == [
        "| disk full | `client 1: no room \\| wait`<br>`again` | `uploads/client_0.safetensors`<br>"
        "`work/images-0-0.safetensors` | resume-from | b | a, b 2x |",
        "| restart | nothing | everything | resume-from | none | none |",
        "| killed | `client 1 failed` | no upload | resume-from | a, b | a, b |",
    ]


def test_a_demonstration_tells_what_it_took_and_no_path(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    config = {"model.name": "vit_base", "model.img-size": 224, "method": "fedavg", "partition.clients": 4}
    config |= {"out-dir": "/home/somebody", "resume-from": "/home/somebody/run"}
    result = {"bytes_up": [343_000_000, 343_400_000], "config": config, "accuracy": {"student": 10.0}}
    result |= {"fingerprint": "0123456789ab", "versions": {"python": "3.11.9"}, "machine": {"device": "cpu"}}
    peaks = {"flwr-serverapp": 1_234_000_000, "flower-superlink": 987_000_000, "flwr-clientapp": 2_500_000_000}
    log = b"a\nfedmitr: run folder: /x y/z\n"
    assert demo.passed_on(log.splitlines(keepends=True)) == "/x y/z"
    assert demo.passed_on([b"a"]) == ""
    assert capfdbinary.readouterr().out == log + b"a"
    said = demo.told(result, peaks, 123.21)
    assert "somebody" not in json.dumps(said)
    assert FAULTS["memory_lines"]([said])[2:] == ["| vit_base, 224 px | fedavg | 4 | 343 | 1.23 | 0.99 | 2.50 | 123 |"]


def test_each_class_has_one_superclass_and_images_keep_theirs_of_which_so_many_are_taken() -> None:
    fine = [name for names in SUPERCLASSES.values() for name in names.split()]
    assert len(SUPERCLASSES) == 20
    assert len(set(fine)) == len(fine) == 100
    for name in (*COARSE, *FINE):
        assert f"{len(set(classes_of(name).values()))}" == name.removeprefix("coarse").removeprefix("fine")
    names = ["bear", "beaver", "rose", "trout", "ray"]
    features = Features({"image": Value("int64"), "label": ClassLabel(names=names)})
    images = Dataset.from_dict({"image": list(range(10)), "label": [0, 1, 2, 3, 4] * 2}, features=features)
    three = [(1, "beaver"), (3, "trout"), (4, "ray"), (6, "beaver"), (8, "trout"), (9, "ray")]  # no bear and no rose
    for name, most, wanted in (("fine20", None, three), ("coarse5", 1, [(2, "flowers"), (3, "fish"), (4, "fish")])):
        found = subset(images, name, most)
        assert [(row["image"], found.features["label"].names[row["label"]]) for row in found] == wanted
