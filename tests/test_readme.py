"""README.md and docs/ against the program: commands run, functions and links lead somewhere, defaults hold.

Commands run as they stand there, on a budget that takes seconds: `SMALL` is put behind each.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import partial, reduce
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_resolve import folder
from tiny import ROOT, an_upload, same, settings

import fedmitr_flwr
from fedmitr_flwr import methods
from fedmitr_flwr.cli import main
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.earlier import RENAMED, RETIRED
from fedmitr_flwr.config.text import parse_assignment
from fedmitr_flwr.flower.simulate import Options, super_link
from fedmitr_flwr.methods.contract import Job

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN_FOLDER = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")

IMAGES = ["ensemble.weights=size", "inversion.steps=4", "distill.rounds=1"]
IMAGES += ["distill.images-per-round=10", "distill.epochs-per-round=1"]
TRAINING = ["local.epochs=1", "data.train-limit=500", "data.test-limit=50"]
SMALL = {"run": [*IMAGES, *TRAINING, "partition.clients=2", "partition.min-size=2"], "fuse": IMAGES}
SMALL["bench"] = [*IMAGES, *TRAINING, 'grid.methods=["fedavg"]']
NOT_RUN = ("pip install -e .", "make ")  # targets of make have to exist


def blocks(mark: str, language: str = r"\w+") -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks right behind the comment `<!-- mark -->`."""
    return re.findall(rf"^<!-- {mark} -->\n```({language})\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with an empty home, in a folder with what the commands name of the checkout."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text: str) -> None:
    """Run lines of `fedmitr` in this process."""
    for line in text.splitlines():
        program, command, *words = map(os.path.expanduser, shlex.split(line))
        assert (program, main([command, *words, *SMALL.get(command, ())])) == ("fedmitr", 0)


def test_every_command_is_run_by_a_test() -> None:
    marked = {text for mark in ("run", "run: data", "run: pretrained", "run: flower") for _, text in blocks(mark)}
    shown = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert all(text in marked or text.startswith(NOT_RUN) for text in shown)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", README)) <= set(targets)


def test_the_marked_commands_run(home: Path) -> None:
    first = home / "fedmitr-runs" / "first"
    for language, text in blocks("run"):
        if language == "python":
            exec(text, {})
        else:
            run(text)
    there = {path.name for path in first.iterdir()} - {".lock"}  # by which one process at a time writes there
    told = set(re.findall(r"`([\w.]+/?)`", RUN_FOLDER.partition("**Resume.**")[0].partition("|---|")[2]))
    # refused/ is in uploads/, work/ is gone when a run has ended, and central/ and diagnostics.json come with a command
    assert there - {"central"} == {name.rstrip("/") for name in told} - {"refused", "work", "diagnostics.json"}
    assert {path.name for path in (first / "fused").iterdir()} >= {"fedavg-1", "fedmitr-1"}
    assert (home / "fedmitr-runs" / "bench-smoke" / "table.md").exists()


def test_the_library_runs_as_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((language, text),) = blocks("run: library")
    run("fedmitr run --name first")
    few = dict(parse_assignment(word, Config().to_flat()) for word in IMAGES)
    monkeypatch.setattr(fedmitr_flwr, "fuse", partial(fedmitr_flwr.fuse, settings=few), raising=False)
    found: dict[str, Any] = {}
    exec(text, found)
    loaded = timm.create_model(f"local-dir:{home / 'fused'}", pretrained=True)
    assert (language, same(loaded.state_dict(), found["result"].student.state_dict())) == ("python", True)


@pytest.mark.parametrize("mark", ["run: data", "run: pretrained"])
def test_the_commands_for_own_images_run(home: Path, mark: str) -> None:
    """On a folder of drawn images; weights come from a file, and at 32 px, since nothing is fetched here."""
    ((_, text),) = blocks(mark)
    folder(home / "path" / "to" / "images", "RGB", (32, 32), each=12)
    if "model.weights=timm" in text:
        save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), "weights.safetensors")
        text = text.replace("model.weights=timm", "model.weights=weights.safetensors model.img-size=32")
    run(text)


@pytest.mark.slow
def test_the_flower_command_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a SuperLink of our own, so that none is left behind. Its environment is what the README exports."""
    ((_, text),) = blocks("run: flower", "bash")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with super_link(Config(), Options(flwr_home=home / "flwr", offline=True)) as environment:

        def bash(text: str) -> str:
            words = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        log = bash(text)
        found = re.search(r"Successfully started run (\d+)", log)
        assert found, log
        assert "finished:completed" in bash(f"flwr list --run-id {found[1]} --format json"), log
    (folder,) = (home / "fedmitr-runs").iterdir()
    assert folder.name == f"fedavg-{found[1]}"
    assert len(list((folder / "uploads").glob("client_*.safetensors"))) == 3


@pytest.mark.usefixtures("home")
def test_bad_input_is_refused_in_the_readme_s_words(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    examples = re.findall(r"^\$ fedmitr (.*)\n(.*)\n", block, re.MULTILINE)
    assert examples
    for words, told in examples:
        assert main(shlex.split(words)) == 2
        assert capsys.readouterr().err.splitlines()[-1] == told


def test_the_picture_fades_halted_patches_to_blue() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "picture.py"))
    targets = torch.tensor([9, 8, 7, 6, 5, 4, 3, 2, 1, 1, *[0] * 10])
    pool = {"images": torch.ones(20, 1, 8, 8), "alive": torch.ones(20, 16, dtype=torch.bool), "targets": targets}
    pool["alive"][10, 0] = False  # the first image of class 0
    (_, real), (_, inverted), (_, halted) = script["rows"](pool)
    assert real.shape == inverted.shape == halted.shape == (10, 8, 8, 3)
    assert (inverted == 1).all()
    red = halted[0, ..., 0] < 1
    assert red[:2, :2].all()  # a patch is 2 x 2 pixels
    assert red.sum() == 4
    assert (halted[1:] == 1).all()


def test_the_example_of_a_method_is_a_method(tmp_path: Path) -> None:
    ((_, text),) = blocks("method: median", "python")
    path = tmp_path / "median.py"
    path.write_text(text, encoding="utf-8")
    config = settings()
    uploads = [an_upload(config, client) for client in range(3)]
    fused = methods.load(str(path)).fuse(Job(uploads, config, torch.device("cpu"), lambda **_: None))
    assert fused.weights is not None
    for name, weight in fused.weights.items():  # of three values the median is neither the least nor the greatest
        assert torch.equal(weight, torch.stack([upload.weights[name] for upload in uploads]).sort(0).values[1])
    assert fused.predict(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


METHOD = ROOT / "docs" / "fedmitr.md"
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").glob("*.md")]
# What was tried, decided and measured, by the settings of that day.
RECORDS = ("CHANGELOG.md", "docs/adr/", "docs/benchmark.md")

_FUNCTION = re.compile(r"`([\w/]+)\.py:([\w.]+)`")
_ROW = re.compile(r"^\| `([a-z]+\.[a-z-]+)` \| (`?)([^|`]+)\2 \|", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_KEY = re.compile(r"\b([a-z]+(?:-[a-z]+)?\.[a-z][a-z-]*[a-z])\b")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_function_that_the_method_s_document_names_exists() -> None:
    text, defaults = METHOD.read_text(encoding="utf-8"), Config().to_flat()
    functions, rows = _FUNCTION.findall(text), _ROW.findall(text.partition("## 5.")[2])
    assert min(len(functions), len(rows)) >= 15
    for file, name in functions:
        module = import_module(f"fedmitr_flwr.{file.replace('/', '.')}")
        assert callable(reduce(getattr, name.split("."), module)), f"{file}.py:{name}"
    for key, quoted, value in rows:
        assert defaults[key] == (value.strip() if quoted else parse_assignment(f"v={value.strip()}")[1]), key


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_relative_links_resolve(path: Path) -> None:
    for link, image in _LINK.findall(path.read_text(encoding="utf-8")):
        target, _, anchor = (link or image).partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        there = (path.parent / unquote(target)).resolve() if target else path
        assert there.exists(), f"{link or image} of {path.name}"
        headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(slug, headings), f"{link} of {path.name}"


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "LOG.md"], ids=named)
def test_every_config_key_exists(path: Path) -> None:
    """But in the log, and in tables that are made from results: these have the settings of their day."""
    known = set(Config().to_flat())
    if named(path).startswith(RECORDS):
        known |= RETIRED.keys() | RENAMED.keys()
    sections = {key.partition(".")[0] for key in known if "." in key}
    past = r"https?://\S+|```(?:python|console)\n.*?```|<!-- (\w+) -->.*?<!-- /\1 -->"
    text = re.sub(past, "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for key in _KEY.findall(text):
        section, _, leaf = key.partition(".")
        if section in sections and leaf not in ("py", "md", "toml", "safetensors", "json", "png", "jsonl", "parquet"):
            assert key in known, f"{key} of {path.name}"
