"""README.md against the program: its commands run, its bad input is refused in its words, its method works.

Commands run as they stand there, on a budget that takes seconds: `SMALL` is put behind each.
"""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import an_upload, settings

from fedmitr_flwr import methods
from fedmitr_flwr.cli import main
from fedmitr_flwr.methods.contract import Job

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN_FOLDER = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")

IMAGES = [
    "ensemble.weights=size",
    "inversion.steps=4",
    "distill.rounds=1",
    "distill.images-per-round=20",
    "distill.epochs-per-round=1",
]
TRAINING = ["local.epochs=1", "partition.clients=2", "partition.min-size=2"]
SMALL = {
    "run": [*IMAGES, *TRAINING],
    "fuse": IMAGES,
    "bench": [*IMAGES, "local.epochs=1", 'grid.methods=["fedavg"]'],
}
NOT_RUN = ("pip install -e .", "make ")  # targets of make have to exist


def blocks(mark: str, language: str = r"\w+") -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks right behind the comment `<!-- mark -->`."""
    return re.findall(rf"^<!-- {mark} -->\n```({language})\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def a_home(folder: Path) -> dict[str, str]:
    """The environment of a user with an empty home, one thread, and this checkout as the program `fedmitr`."""
    home, programs = folder / "home", folder / "bin"
    home.mkdir()
    programs.mkdir()
    shim = programs / "fedmitr"
    cases = "".join(f'  {command}) set -- "$@" {shlex.join(words)};;\n' for command, words in SMALL.items())
    shim.write_text(
        f'#!/bin/sh\ncase "$1" in\n{cases}esac\nexec "{sys.executable}" -m fedmitr_flwr "$@"\n', encoding="utf-8"
    )
    shim.chmod(0o755)
    return {
        **os.environ,
        "HOME": str(home),
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def ran(language: str, text: str, folder: Path, environment: dict[str, str]) -> None:
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_is_run_by_a_test() -> None:
    marked = {text for mark in ("run", "run: data", "run: pretrained", "run: flower") for _, text in blocks(mark)}
    shown = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert all(text in marked or text.startswith(NOT_RUN) for text in shown)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", README)) <= set(targets)


@pytest.mark.slow
def test_the_marked_commands_run(tmp_path: Path) -> None:
    environment = a_home(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # the checkout, in which the commands are given
    marked = blocks("run")
    assert [language for language, _ in marked] == ["bash", "python", "bash"]
    for language, text in marked:
        ran(language, text, tmp_path, environment)
    first = tmp_path / "home" / "fedmitr-runs" / "first"
    there = {path.name for path in first.iterdir()} - {".lock"}  # by which one process at a time writes there
    told = set(re.findall(r"`([\w.]+/?)`", RUN_FOLDER.partition("**Resume.**")[0].partition("|---|")[2]))
    # refused/ is in uploads/, work/ is gone when a run has ended, and central/ comes with its command
    assert there - {"central"} == {name.rstrip("/") for name in told} - {"refused", "work"}
    assert {path.name for path in (first / "fused").iterdir()} >= {"fedavg-1", "fedmitr-1"}


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["run: data", "run: pretrained"])
def test_the_commands_for_own_images_run(tmp_path: Path, mark: str) -> None:
    """On a folder of drawn images; weights come from a file, and at 32 px, since nothing is fetched here."""
    ((language, text),) = blocks(mark)
    some_images(tmp_path / "path" / "to" / "images")
    if "model.weights=timm" in text:
        weights = tmp_path / "weights.safetensors"
        save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), weights)
        text = text.replace("model.weights=timm", f"model.weights={weights} model.img-size=32")
    ran(language, text, tmp_path, a_home(tmp_path))


def some_images(folder: Path) -> None:
    """A dozen of each of two classes, and two for the test."""
    for split, count in (("train", 12), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            there = folder / split / name
            there.mkdir(parents=True)
            for image in range(count):
                noise = torch.randint(100 * number, 100 + 100 * number, (32, 32, 3), dtype=torch.uint8)
                Image.fromarray(noise.numpy()).save(there / f"{image}.png")


def _flower_run() -> ModuleType:
    """scripts/ is no package; the wrapper's own SuperLink, with ports and FLWR_HOME of its own, is what we need."""
    spec = importlib.util.spec_from_file_location("readme_flower_run", ROOT / "scripts" / "flower_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_flower_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a SuperLink of our own, so that none is left behind. Its environment is what the README exports."""
    wrapper = _flower_run()
    ((_, text),) = blocks("run: flower", "bash")
    for name, value in a_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wrapper.signal, "signal", lambda *_: None)  # `stop` would make this process deaf to Ctrl-C
    options = wrapper._parse([f"--flwr-home={tmp_path / 'flwr'}", "--offline"])
    with wrapper.super_link(options, wrapper.settings(options)) as environment:
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        log = done.stdout + done.stderr
        found = re.search(r"Successfully started run (\d+)", log)
        assert found, log
        query = ["flwr", "list", "--run-id", found[1], "--format", "json"]
        listed = subprocess.run(query, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert "finished:completed" in listed.stdout, log
    (folder,) = (tmp_path / "home" / "fedmitr-runs").iterdir()
    assert folder.name == f"fedavg-{found[1]}"
    assert len(list((folder / "uploads").glob("client_*.safetensors"))) == 3


def test_bad_input_is_refused_in_the_readme_s_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (block,) = re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    examples = re.findall(r"^\$ fedmitr (.*)\n(.*)\n", block, re.MULTILINE)
    assert examples
    for words, told in examples:
        assert main(shlex.split(words)) == 2
        assert capsys.readouterr().err.splitlines()[-1] == told


def test_the_picture_fades_halted_patches_to_blue(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "picture.py"))
    alive = torch.ones(20, 16, dtype=torch.bool)
    alive[10, 0] = False  # the first image of class 0
    pool = {
        "images": torch.ones(20, 1, 8, 8),
        "alive": alive,
        "targets": torch.tensor([9, 8, 7, 6, 5, 4, 3, 2, 1, 1, *[0] * 10]),
    }
    (_, real), (_, inverted), (_, halted) = script["rows"](pool)
    assert real.shape == inverted.shape == halted.shape == (10, 8, 8, 3)
    assert (inverted == 1).all()
    red = halted[0, ..., 0] < 1
    assert red[:2, :2].all()  # a patch is 2 x 2 pixels
    assert red.sum() == 4
    assert (halted[1:] == 1).all()
    save_file(pool, tmp_path / "pool.safetensors")
    script["main"](tmp_path, tmp_path / "images.png")
    with Image.open(tmp_path / "images.png") as image:
        assert image.size == (1000, 310)


def test_the_example_of_a_method_is_a_method(tmp_path: Path) -> None:
    ((_, text),) = blocks("method: median", "python")
    path = tmp_path / "median.py"
    path.write_text(text, encoding="utf-8")
    config = settings()
    uploads = [an_upload(config, client) for client in range(3)]
    fused = methods.load(str(path)).fuse(Job(uploads, config, torch.device("cpu"), lambda **_: None))
    assert fused.weights is not None
    for name, weight in fused.weights.items():  # of three values the median is neither the least nor the greatest
        low, middle, high = torch.stack([upload.weights[name] for upload in uploads]).sort(0).values
        assert torch.equal(weight, middle)
        assert (low <= weight).all()
        assert (weight <= high).all()
    assert fused.predict(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
