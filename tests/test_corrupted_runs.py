"""A run folder that was cut, altered or mixed up: the result of the whole one to the bit, or one line and status 2.

A seeded table of mutations, each on a fresh copy of a tiny run. What is compared are the tensors of the model that
`fuse` or a resumed run makes, and the page of `report`.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tiny import settings

from fedmitr_flwr import pipeline
from fedmitr_flwr.cli import main
from fedmitr_flwr.common.errors import UserError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.runs.folder import RunFolder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run, whose fusion `begun` was killed when it had distilled, so that its checkpoints are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmitr_flwr.report.charts.as_svg", lambda *_: "")  # drawn, and not written out
        small = {"model.width": 16, "model.depth": 1, "inversion.steps": 4, "method": "fedmitr"}
        run = pipeline.run(settings(**small | {"out-dir": str(tmp_path_factory.mktemp("whole"))}), "run")
        with pytest.MonkeyPatch.context() as kill:
            kill.setattr(pipeline, "evaluate_on", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pipeline.fuse(run, "fedmitr", {}, "begun")
        pieces = {path.name for path in (run.path / "fused" / "begun" / "work").iterdir()}
        assert pieces == {"images-0-0.safetensors", "student.safetensors"}
        yield run.path


# What becomes of a file's bytes, `at` a place among them.
BYTES: dict[str, Callable[[bytes, int, random.Random], bytes]] = {
    "flip": lambda content, at, rng: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
    "overwrite": lambda content, at, rng: content[:at] + rng.randbytes(len(content[at : at + 16])) + content[at + 16 :],
    "cut": lambda content, at, _: content[:at],
    "cut at a line": lambda content, at, _: content[: content.rfind(b"\n", 0, at) + 1],
    "without a line": lambda content, at, _: (
        content[: content.rfind(b"\n", 0, at) + 1] + content[at:].partition(b"\n")[2]
    ),
    "exchange": lambda content, at, _: content[at:] + content[:at],
    "append": lambda content, _, rng: content + rng.randbytes(9),
    "empty": lambda *_: b"",
    "deep": lambda *_: b"[" * 100_000,
}
# What stands in the place of a file and is none.
NO_FILES: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "circle": lambda path: path.symlink_to(path.name),
}
ODD = [None, -1, 0, 1.5, 10**30, "x", "", [], {}, [[]], {"a": {"b": []}}, True, float("nan"), float("inf")]


def another_file(path: Path, rng: random.Random) -> None:
    run = next(parent for parent in path.parents if (parent / "uploads").is_dir())
    others = [each for each in sorted(run.rglob("*.*")) if each.is_file() and each.suffix == path.suffix]
    shutil.copy(rng.choice([each for each in others if each != path] or [run / "config.json"]), path)


def renamed(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name(rng.choice([f"{path.name}.bak", path.name.replace("0", "1", 1), f"x{path.name}"])))


def an_odd_value(path: Path, rng: random.Random) -> None:
    """Anywhere in a JSON file, or in one line of it."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(len(lines))
    lines[number] = json.dumps(_odd(json.loads(lines[number]), rng))
    path.write_text("\n".join(lines) + "\n")


def _odd(value: Any, rng: random.Random) -> Any:
    if not value or not isinstance(value, dict | list) or rng.random() < 0.2:
        return rng.choice(ODD)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key] = _odd(value[key], rng)
    return value


def with_head(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON at the beginning of a safetensors file, which stays well-formed."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    change(head)
    written = json.dumps(head).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])


def an_odd_header(path: Path, rng: random.Random) -> None:
    """Our own entry says something else: of a key, or altogether."""

    def change(head: dict[str, Any]) -> None:
        own = json.loads(head["__metadata__"]["fedmitr"])
        if rng.random() < 0.8:
            own[rng.choice(list(own))] = rng.choice(ODD)
        else:
            own = rng.choice(ODD)
        texts = [json.dumps(own), *(["[" * 50_000, "1" * 5_000] if rng.random() < 0.2 else [])]
        head["__metadata__"]["fedmitr"] = rng.choice(texts)

    with_head(path, change)


def odd_tensors(path: Path, rng: random.Random) -> None:
    """Another type or shape of as many bytes, or another name."""

    def change(head: dict[str, Any]) -> None:
        name = rng.choice([name for name in head if name != "__metadata__"])
        entry = head.pop(name)
        entry["dtype"] = rng.choice([entry["dtype"], "I32", "U32"])
        entry["shape"] = rng.choice([entry["shape"], entry["shape"][::-1], [1, *entry["shape"]]])
        head[rng.choice([name, name + "x", "\x1b[31m"])] = entry

    with_head(path, change)


OTHERS: list[Callable[[Path, random.Random], None]] = [another_file, renamed, an_odd_value, an_odd_header, odd_tensors]
MUTATIONS = {mutate.__name__: mutate for mutate in OTHERS}


def mutate(path: Path, how: str, rng: random.Random) -> None:
    if how in BYTES:
        content = path.read_bytes()
        path.write_bytes(BYTES[how](content, rng.randrange(1, len(content)), rng))
    elif how in NO_FILES:
        path.unlink()
        NO_FILES[how](path)
    else:
        MUTATIONS[how](path, rng)


ANY_FILE = ["flip", "overwrite", "cut", "exchange", "append", "empty", *NO_FILES, "another_file"]
PIECE = [*ANY_FILE, "an_odd_header", "an_odd_header", "odd_tensors"]
UPLOAD = [*ANY_FILE, *["flip"] * 3, *["an_odd_header"] * 10, *["odd_tensors"] * 3, "renamed"]
RESULT = [*ANY_FILE, *["flip"] * 3, *["an_odd_value"] * 12, "cut at a line", "without a line", "deep"]
# File, what is done to it, how often, and by which command the folder is then looked at.
TABLE = [
    ("config.toml", [*ANY_FILE, *["flip", "cut at a line", "without a line"] * 2], 3, "fuse"),
    ("uploads/client_000.safetensors", UPLOAD, 2, "fuse"),
    ("uploads/client_001.safetensors", UPLOAD, 2, "fuse"),
    ("fused/begun/work/images-0-0.safetensors", PIECE, 1, "begun"),
    ("fused/begun/work/student.safetensors", PIECE, 1, "begun"),
    ("result.json", RESULT, 3, "report"),
    ("metrics.jsonl", [*ANY_FILE, *["an_odd_value"] * 8, "cut at a line", "deep"], 2, "report"),
]


def test_no_mutation_of_a_run_folder_gives_a_traceback_or_another_result(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tried(what: str, command: str, name: str = "", how: str = "") -> tuple[int, Any]:
        """(exit status, what came of it) on a copy of the run; a refusal is one line."""
        run = shutil.copytree(whole, tmp_path / what.replace("/", "-"), symlinks=True)
        if how:
            mutate(run / name, how, random.Random(what))
        try:
            return done(run, command, capsys, what)
        finally:
            shutil.rmtree(run)

    wanted = {command: tried(command, command) for command in ("fuse", "begun", "report")}
    assert all(status == 0 for status, _ in wanted.values())
    statuses = []
    for name, mutations, times, command in TABLE:
        for number, how in enumerate(mutations * times):
            what = f"{name}, {how} {number}, {command}"
            status, found = tried(what, command, name, how)
            assert status == 2 or found == wanted[command][1] or name == "metrics.jsonl", what
            statuses.append(status)
    assert len(statuses) > 300
    assert 0.5 < statuses.count(2) / len(statuses) < 1  # some mutations change nothing that counts


def done(run: Path, command: str, capsys: pytest.CaptureFixture[str], what: str) -> tuple[int, Any]:
    capsys.readouterr()
    if command == "begun":
        try:
            pipeline.fuse(RunFolder.open(run), "fedmitr", {}, "begun")
        except UserError:
            return 2, None
        return 0, model_of(run / "fused" / "begun")
    words = ["fuse", str(run), "--method", "fedavg"] if command == "fuse" else ["report", str(run)]
    status, made = main(words), run / "fused" / "fedavg-1"
    if status:
        lines = capsys.readouterr().err.splitlines()
        assert [line.startswith("fedmitr: error:") for line in lines] == [False] * (len(lines) - 1) + [True], what
        assert not (made / "model.safetensors").exists(), what
        assert not (made / "result.json").exists(), what
        assert status == 2, what
        return status, None
    return 0, model_of(made) if command == "fuse" else (run / "report.html").read_text()


def model_of(folder: Path) -> dict[str, bytes]:
    return {name: each.numpy().tobytes() for name, each in load_tensors(folder / "model.safetensors")[0].items()}
