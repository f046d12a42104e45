"""deploy/Dockerfile and compose.yaml by what can be known without Docker: what they copy, start and mount exists."""

import re
import stat
import tomllib
from typing import Any

import yaml
from tiny import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def test_all_that_the_image_needs_is_copied() -> None:
    """Also what the wheel is built from, and through the list of what Docker may see."""
    copied = [
        word for line in re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()
    ]
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*build["packages"], *build["force-include"], project["project"]["readme"]} <= set(copied)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {path.partition("/")[0] for path in copied} == {line[1:] for line in ignored if line.startswith("!")}


def test_services_start_our_scripts_on_what_is_mounted() -> None:
    services = COMPOSE["services"]
    clients = tomllib.loads((ROOT / "configs" / "deployment.toml").read_text(encoding="utf-8"))["flower"]["clients"]
    assert list(services) == ["superlink", *clients.split(" | ")]
    for name, service in services.items():
        script, credentials, *words = service["command"]
        assert (ROOT / script).stat().st_mode & stat.S_IXUSR
        mounts = dict(re.search(r"(.*?):(/[^:]*)(?::ro)?$", volume).groups()[::-1] for volume in service["volumes"])
        assert mounts[credentials] == "credentials"
        assert mounts["/var/lib/fedmitr"] in COMPOSE["volumes"]
        if name == "superlink":
            assert script == "deploy/superlink.sh"
            assert words == ["/var/lib/fedmitr", "0.0.0.0", "8443"]
            assert "ports" not in service
        else:
            assert (script, words[:2]) == ("deploy/supernode.sh", ["superlink:8443", name])
            assert mounts[words[2]].endswith(f"/{name}")
    connection = tomllib.loads((DEPLOY / "connection.toml").read_text(encoding="utf-8"))["superlink"]
    assert connection[connection["default"]]["address"] == "127.0.0.1:8443"
