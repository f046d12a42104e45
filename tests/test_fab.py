"""The bundle that Flower ships to the clients holds every module, and nothing else."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedmitr_flwr", "server_app", "client_app")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the bundle. Built from a copy, because Flower wants a folder name without underscores and dots."""
    copy = tmp_path_factory.mktemp("fab") / "fedmitr-flwr"
    copy.mkdir()
    for name in ("pyproject.toml", ".gitignore", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for folder in (*PACKAGES, "tests", "configs", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder)
    program = Path(sys.executable).with_name("flwr")
    environment = os.environ | {"FLWR_HOME": str(copy.parent / "home")}
    built = subprocess.run([program, "build"], cwd=copy, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (fab,) = copy.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        return archive.namelist()


def test_it_holds_every_module_of_the_three_packages(bundle: list[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert len(modules) > 20
    assert modules - set(bundle) == set()


def test_it_holds_nothing_else(bundle: list[str]) -> None:
    others = [name for name in bundle if not name.startswith(tuple(f"{package}/" for package in PACKAGES))]
    assert set(others) <= {"pyproject.toml", "LICENSE", "README.md", ".gitignore", ".info/CONTENT"}
    assert not [name for name in bundle if "test" in name]


def test_its_fingerprint_is_the_checkouts(bundle: list[str], tmp_path: Path) -> None:
    """Client and server compare it, and the one may run from the bundle, the other from the checkout."""
    from fedmitr_flwr.common.fingerprint import _of_folder, fingerprint

    for name in bundle:
        if name.startswith("fedmitr_flwr/"):
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    assert _of_folder(tmp_path / "fedmitr_flwr") == fingerprint()
