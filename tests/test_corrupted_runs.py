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

import pytest
from tiny import same, settings

from fedmitr_flwr import pipeline
from fedmitr_flwr.cli import main
from fedmitr_flwr.common.errors import UserError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.runs.folder import RunFolder

Mutation = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run, whose fusion `begun` was killed when it had distilled, so that its checkpoints are there."""
    with pytest.MonkeyPatch.context() as patch:
        for picture in ("save_images", "save_partition"):
            patch.setattr(pipeline, picture, lambda *_: None)
        patch.setattr("fedmitr_flwr.report.page.as_svg", lambda _: "")  # drawn, and not written out
        small = {"model.width": 16, "model.depth": 1, "inversion.steps": 4, "method": "fedmitr"}
        run = pipeline.run(settings(**small | {"out-dir": str(tmp_path_factory.mktemp("whole"))}), "run")
        with pytest.MonkeyPatch.context() as kill:
            kill.setattr(pipeline, "evaluate_on", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pipeline.fuse(run, "fedmitr", {}, "begun")
        pieces = {path.name for path in (run.path / "fused" / "begun" / "work").iterdir()}
        assert pieces == {"images-0-0.safetensors", "student.safetensors"}
        yield run.path


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def overwrite(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    content[start : start + 16] = rng.randbytes(len(content[start : start + 16]))
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(1, len(content))])


def cut_at_a_line(path: Path, rng: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: rng.randrange(len(lines))]))


def without_a_line(path: Path, rng: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    path.write_bytes(b"".join(lines))


def exchange(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    place = rng.randrange(1, len(content))
    path.write_bytes(content[place:] + content[:place])


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(9))


def empty(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def in_its_place(make: Callable[[Path], object]) -> Mutation:
    """Something that is no file."""

    def replaced(path: Path, _: random.Random) -> None:
        path.unlink()
        make(path)

    return replaced


def another_file(path: Path, rng: random.Random) -> None:
    run = next(parent for parent in path.parents if (parent / "uploads").is_dir())
    others = [each for each in sorted(run.rglob("*.*")) if each.is_file() and each.suffix == path.suffix]
    shutil.copy(rng.choice([each for each in others if each != path] or [run / "model.json"]), path)


def renamed(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name(rng.choice([f"{path.name}.bak", path.name.replace("0", "1", 1), f"x{path.name}"])))


ODD = [None, -1, 0, 1.5, 10**30, "x", "", [], {}, [[]], {"a": {"b": []}}, True, float("nan"), float("inf")]
NO_FILES: list[Callable[[Path], object]] = [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")]
NO_FILES += [lambda path: path.symlink_to(path.name)]
ANY_FILE: list[Mutation] = [flip, overwrite, cut, exchange, append, empty, *map(in_its_place, NO_FILES), another_file]


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


def deep(path: Path, _: random.Random) -> None:
    path.write_text("[" * 100_000)


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


# File, what is done to it, and by which command the folder is then looked at.
UPLOAD: list[Mutation] = [*ANY_FILE, *[flip] * 5, *[an_odd_header] * 12, *[odd_tensors] * 4, renamed]
PIECE: list[Mutation] = [*ANY_FILE, flip, flip, an_odd_header, an_odd_header, odd_tensors]
CONFIG: list[Mutation] = [*ANY_FILE, *[flip] * 4, *[cut_at_a_line] * 3, *[without_a_line] * 3]
RESULT: list[Mutation] = [*ANY_FILE, *[flip] * 8, *[an_odd_value] * 16, cut_at_a_line, without_a_line, deep]
TABLE: list[tuple[str, list[Mutation], str]] = [
    ("config.toml", CONFIG, "fuse"),
    ("uploads/client_000.safetensors", UPLOAD, "fuse"),
    ("uploads/client_001.safetensors", ANY_FILE, "fuse"),
    ("fused/begun/work/images-0-0.safetensors", PIECE, "begun"),
    ("fused/begun/work/student.safetensors", PIECE, "begun"),
    ("result.json", RESULT, "report"),
    ("metrics.jsonl", [*ANY_FILE, *[an_odd_value] * 16, cut_at_a_line, deep], "report"),
]


def test_no_mutation_of_a_run_folder_gives_a_traceback_or_another_result(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tried(what: str, command: str, name: str = "", mutate: Mutation | None = None) -> tuple[int, Any]:
        """(exit status, what came of it) on a copy of the run; a refusal is one line."""
        run = shutil.copytree(whole, tmp_path / what.replace("/", "-"), symlinks=True)
        if mutate:
            mutate(run / name, random.Random(what))
        try:
            return done(run, command, capsys, what)
        finally:
            shutil.rmtree(run)

    wanted = {command: tried(command, command) for command in ("fuse", "begun", "report")}
    assert all(status == 0 for status, _ in wanted.values())
    statuses = []
    for name, mutations, command in TABLE:
        for number, mutate in enumerate(mutations):
            what = f"{name}, {mutate.__name__} {number}, {command}"
            status, found = tried(what, command, name, mutate)
            assert status == 2 or equal(found, wanted[command][1]) or name == "metrics.jsonl", what
            statuses.append(status)
    assert len(statuses) > 150
    assert 0.5 < statuses.count(2) / len(statuses) < 1  # some mutations change nothing that counts


def done(run: Path, command: str, capsys: pytest.CaptureFixture[str], what: str) -> tuple[int, Any]:
    capsys.readouterr()
    if command == "begun":
        try:
            pipeline.fuse(RunFolder.open(run), "fedmitr", {}, "begun")
        except UserError:
            return 2, None
        return 0, load_tensors(run / "fused" / "begun" / "model.safetensors")[0]
    words = ["fuse", str(run), "--method", "fedavg"] if command == "fuse" else ["report", str(run)]
    status, made = main(words), run / "fused" / "fedavg-1"
    if status:
        lines = capsys.readouterr().err.splitlines()
        assert [line.startswith("fedmitr: error:") for line in lines] == [False] * (len(lines) - 1) + [True], what
        assert not (made / "model.safetensors").exists(), what
        assert not (made / "result.json").exists(), what
        assert status == 2, what
        return status, None
    return 0, load_tensors(made / "model.safetensors")[0] if command == "fuse" else (run / "report.html").read_text()


def equal(found: Any, wanted: Any) -> bool:
    return same(found, wanted) if isinstance(found, dict) else bool(found == wanted)
