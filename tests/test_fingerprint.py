"""The code fingerprint: equal code gives equal characters, wherever it lies."""

import hashlib
import shutil
from pathlib import Path

import pytest

from fedmitr_flwr.common.fingerprint import _core_of, _of_folder, _of_method, _with_apps, core, fingerprint, of_flower

PACKAGE = Path(__file__).parent.parent / "fedmitr_flwr"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package as an app bundle has it: Python files only, at another place."""
    return shutil.copytree(PACKAGE, tmp_path / "bundle" / "fedmitr_flwr", ignore=shutil.ignore_patterns("__pycache__"))


def test_by_hand(tmp_path: Path) -> None:
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
        shutil.copytree(PACKAGE.parent / app, tmp_path / app, ignore=shutil.ignore_patterns("__pycache__"))
    assert _with_apps(core(), tmp_path) == of_flower() != core()
    (tmp_path / "server_app" / "builtin.py").write_text("")
    assert _with_apps(core(), tmp_path) != of_flower()
