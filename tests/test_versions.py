"""The code's fingerprint; the bundle that Flower ships is that code; apps of other code or Flower say what to do."""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from local_grid import TINY, LocalGrid, complaint

from client_app.app import app as client_app
from fedmitr_flwr.common.errors import RunError
from fedmitr_flwr.common.fingerprint import _core_of, _of_folder, _of_method, _with_apps, core, fingerprint, of_flower
from fedmitr_flwr.common.releases import FLWR, release, require, too_old
from fedmitr_flwr.config import Config
from fedmitr_flwr.flower.simulate import app_in
from server_app.clients import meet
from server_app.records import order

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedmitr_flwr", "fedmitr_ray", "server_app", "client_app")


def test_older_is_by_the_first_two_numbers_and_not_by_letter() -> None:
    versions = {"1.41.0": (1, 41), "1.42.0.dev20261101": (1, 42), "2.0": (2, 0), "1.9.3": (1, 9)}
    versions |= dict.fromkeys(("", "none", "1"), (0, 0))
    assert {version: release(version) for version in versions} == versions
    assert too_old("1.9.0", "1.41.0")
    for newer in ("1.41.5", "1.41.0", "2.0.0"):
        assert too_old(newer, "1.41.2") is None  # the last number is repairs
    require(FLWR)


def test_an_app_under_an_older_flower_says_so_before_it_imports_from_it() -> None:
    old = "import sys, types; old = sys.modules['flwr'] = types.ModuleType('flwr'); old.__version__ = '1.30.0'\n"
    told = f"this app cannot be loaded: flwr 1.30.0 is too old; run there: pip install 'flwr[simulation]~={FLWR}'"
    for app in ("client_app", "server_app"):
        code = f"{old}import {app}.app"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.stderr.strip().splitlines()[-1] == f"ImportError: {told}"


Change = Callable[[Message], Message]


def says(where: str, **changes: Any) -> Change:
    """Something else in this record; None: nothing."""

    def change(reply: Message) -> Message:
        record = reply.content[where]
        told = dict(record) | {key.replace("_", "-"): value for key, value in changes.items()}
        reply.content[where] = type(record)({key: value for key, value in told.items() if value is not None})
        return reply

    return change


def without(name: str) -> Change:
    def change(reply: Message) -> Message:
        del reply.content[name]
        return reply

    return change


def cannot_load(reply: Message) -> Message:
    error = Message(Error(1, "An exception was raised when attempting to load `ClientApp`"), reply_to=reply)
    error.metadata.__dict__.update(reply.metadata.__dict__)
    return error


WHO = r"client 1 \(node 1007\)"
SILENT = "node 1007 does not say who it is"
OTHERS: dict[str, tuple[Change, str]] = {
    "older flower": (says("name", flwr="1.39.0"), rf"{WHO}: flwr 1.39.0 is too old; run there: pip install 'flwr"),
    "no version": (says("name", flwr=None), rf"{WHO}: flwr of an unknown version is too old"),
    "other code": (says("card", fingerprint=0xABC), rf"{WHO} runs other code \(000000000abc\).*restart"),
    "no card": (without("card"), f"{SILENT} as this app does; restart the SuperLink"),
    "no texts": (without("name"), SILENT),
    "a list for a number": (says("card", partition_id=[1, 2]), SILENT),
    "infinity for a number": (says("card", partition_id=float("inf")), SILENT),
    "not loaded": (cannot_load, "node 1007 cannot take part: .*its SuperNode's log says why: .* flwr >= 1.41.0"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_server_refuses_before_anybody_trains(name: str) -> None:
    change, line = OTHERS[name]
    grid = LocalGrid(client_app, 3, cards=lambda reply, client: [change(reply) if client == 1 else reply])
    with pytest.raises(RunError, match=line) as refused:
        meet(grid, Config.from_flat(TINY))
    assert "\n" not in str(refused.value)
    assert not grid.clients_asked("train")


@pytest.mark.parametrize("kind", ["query.describe", "train", "evaluate"])
def test_the_client_refuses_a_server_of_other_code_and_does_not_read_its_settings(kind: str) -> None:
    grid = LocalGrid(client_app, 2)
    other = dict(order(Config.from_flat(TINY))) | {"fingerprint": b"0123456789ab", "toml": b"new-key = 3"}
    for told, code in ((other, "0123456789ab"), ({"lr": 0.1}, "which it does not tell")):
        content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord(told)})
        (reply,) = grid.send_and_receive([Message(content, grid.node(0), kind)])
        fix = "restart the SuperLink and its SuperNodes from one checkout"
        assert complaint(reply) == f"the server runs other code ({code}) than this client ({core()}); {fix}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the bundle. Built from a copy, because Flower wants a folder name without underscores and dots."""
    copy = app_in(tmp_path_factory.mktemp("fab") / "fedmitr-flwr")
    shutil.copytree(ROOT / "tests", copy / "tests")
    program = Path(sys.executable).with_name("flwr")
    environment = os.environ | {"FLWR_HOME": str(copy.parent / "home")}
    built = subprocess.run([program, "build"], cwd=copy, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (fab,) = copy.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        return archive.namelist()


def test_it_holds_every_module_of_the_packages(bundle: list[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert len(modules) > 20
    assert modules - set(bundle) == set()
    others = [name for name in bundle if not name.startswith(tuple(f"{package}/" for package in PACKAGES))]
    assert set(others) <= {"pyproject.toml", "LICENSE", "README.md", ".gitignore", ".info/CONTENT"}
    assert not [name for name in bundle if "test" in name]


# --- the fingerprint: equal code gives equal characters, wherever it lies


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package as an app bundle has it: Python files only, at another place."""
    return shutil.copytree(
        ROOT / "fedmitr_flwr", tmp_path / "bundle" / "fedmitr_flwr", ignore=shutil.ignore_patterns("__pycache__")
    )


def test_an_installed_package_has_the_presets_and_the_apps_of_the_checkout(tmp_path: Path) -> None:
    """Laid out as pyproject.toml has the wheel laid out; nothing here needs torch."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    ignored = shutil.ignore_patterns("__pycache__")
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for source, target in wheel["force-include"].items():
        place = tmp_path / target
        place.parent.mkdir(exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=ignored)
        else:
            shutil.copy(ROOT / source, place)
    code = """import sys
sys.modules["torch"] = None
from pathlib import Path
from fedmitr_flwr.common.fingerprint import core, fingerprint, of_flower
from fedmitr_flwr.config.presets import BENCHES, SETTINGS, presets
from fedmitr_flwr.flower.simulate import app_in
print(fingerprint(), core(), of_flower(), *presets(SETTINGS), *presets(BENCHES))
app_in(Path("app"))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    names = [path.stem for folder in ("configs", "configs/bench") for path in sorted((ROOT / folder).glob("*.toml"))]
    assert done.stdout.split() == [fingerprint(), core(), of_flower(), *names], done.stderr
    assert done.returncode == 0, done.stderr
    assert _of_folder(tmp_path / "app") == _of_folder(app_in(tmp_path / "other"))


def test_a_fingerprint_by_hand(tmp_path: Path) -> None:
    """Content cannot pass for a path: its length stands before it."""
    (tmp_path / "b.py").write_bytes(b"2\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.py").write_bytes(b"")
    assert _of_folder(tmp_path) == hashlib.sha256(b"a/c.py\n0\nb.py\n2\n2\n").hexdigest()[:12]


def test_a_copy_has_the_same_and_what_is_not_bundled_does_not_count(copy: Path) -> None:
    assert _of_folder(copy) == fingerprint()
    for name in ("notes.txt", "test_x.py", "x_test.py", ".ipynb_checkpoints/config.py", "__pycache__/config.pyc"):
        path = copy / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n")
    (copy / ".#config.py").symlink_to("nobody@nowhere")  # an editor's lock
    assert _of_folder(copy) == fingerprint()
    new = copy / "new.py"
    new.write_text("")
    changed = _of_folder(copy)
    assert len({fingerprint(), changed, _of_folder(new.rename(copy / "newer.py").parent)}) == 3


def appended(path: Path) -> None:
    with path.open("a") as file:
        file.write("# changed\n")


def test_the_core_is_what_can_change_a_number(copy: Path) -> None:
    about_results = ("bench/table.py", "report/new.py", "cli.py", "methods/adi.py")
    for changed in (*about_results, "methods/contract.py", "common/rng.py"):
        before = _core_of(copy), _of_folder(copy)
        appended(copy / changed)
        assert (_core_of(copy) == before[0]) == (changed in about_results)
        assert _of_folder(copy) != before[1]
    assert core() != fingerprint()


def test_of_the_methods_only_what_ran_counts(copy: Path) -> None:
    def codes() -> dict[str, str]:
        return {method: _of_method(copy, method) for method in ("fedavg", "adi", "dense", "central")}

    def changed(name: str) -> set[str]:
        before = codes()
        appended(copy / name)
        return {method for method, code in codes().items() if code != before[method]}

    assert len(set(codes().values())) == 4
    assert changed("methods/new.py") == set()
    assert changed("methods/dense.py") == {"dense"}
    assert changed("methods/fedmitr.py") == {"adi"}  # which imports it
    assert changed("methods/contract.py") == changed("common/rng.py") == set(codes())


def test_flower_s_strategies_depend_on_the_apps_too(tmp_path: Path) -> None:
    for app in ("server_app", "client_app"):
        shutil.copytree(ROOT / app, tmp_path / app, ignore=shutil.ignore_patterns("__pycache__"))
    assert _with_apps(core(), tmp_path.joinpath) == of_flower() != core()
    (tmp_path / "server_app" / "builtin.py").write_text("")
    assert _with_apps(core(), tmp_path.joinpath) != of_flower()
