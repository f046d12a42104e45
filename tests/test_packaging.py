"""What is published: Flower's own checks of an app, and versions that agree wherever they are said."""

import re
import shutil
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from flwr.cli.config_utils import load_and_validate
from flwr.supercore.fab_format_version import normalize_and_validate_fab_format
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tiny import ROOT

from fedmitr_flwr.common.releases import FLWR

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of Flower's own use of pathspec
def test_flower_hub_takes_the_app(tmp_path: Path) -> None:
    """All that `flwr app publish` checks before it sends anything."""
    import_module("flwr.cli.app_cmd.publish")
    publish = sys.modules["flwr.cli.app_cmd.publish"]  # its package has a function of this name
    app = tmp_path / PROJECT["name"]
    shutil.copytree(ROOT, app, ignore=shutil.ignore_patterns(".git", ".venv", ".flwr", ".*_cache"))
    config, _ = load_and_validate(app / "pyproject.toml", check_module=False)
    found = normalize_and_validate_fab_format(config)
    assert (found.fab_format_version, found.flwr_version_min, found.flwr_version_target) == (1, "1.41", FLWR)
    publish._validate_app_name(app.name, "folder")
    publish._validate_description(config["project"]["description"])
    files = publish._collect_file_paths(app)
    publish._validate_files(files)
    there = {path.relative_to(app).as_posix() for path in files}
    assert there >= {"LICENSE", "README.md", "server_app/app.py", "client_app/app.py", "fedmitr_flwr/cli.py"}


def test_every_version_that_is_promised_is_tried() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["versions"]["strategy"]["matrix"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    (flwr,) = (each for each in NEEDED if each.name == "flwr")
    minors = [f"1.{minor}" for minor in range(60) if Version(f"1.{minor}") in flwr.specifier]
    assert (matrix["python"], matrix["flwr"]) == (promised, minors)


def test_a_deployment_s_versions_are_among_those_that_are_allowed() -> None:
    lines = (ROOT / "deploy" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = {canonicalize_name(one.name): one.specifier for one in map(Requirement, lines[1:])}
    privacy = map(Requirement, PROJECT["optional-dependencies"]["privacy"])
    for one in (*NEEDED, *privacy):
        if one.marker is None:
            (specifier,) = exact[canonicalize_name(one.name)]
            assert (specifier.operator, Version(specifier.version) in one.specifier) == ("==", True), one
