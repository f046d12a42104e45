"""The scripts of deploy/: certificates that verify, keys that Flower reads, nothing overwritten, one-line mistakes."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.common.config import parse_config_args

DEPLOY = Path(__file__).parents[1] / "deploy"

pytestmark = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="needs openssl and ssh-keygen"
)


def sh(script: str, *words: str | Path, path: str = "") -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(["sh", DEPLOY / script, *words], capture_output=True, text=True, env=environment)


def a_program(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def verifies(folder: Path, *words: str) -> bool:
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", folder / "ca.crt", *words]
    return subprocess.run([*command, folder / "server.crt"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("credentials") / "with space"
    for words in (["ca"], ["server", "fl.example.org", "203.0.113.7", "2001:db8::1", "localhost"], ["node", "site-a"]):
        done = sh("credentials.sh", words[0], folder, *words[1:])
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_the_server_is_who_it_was_named(made: Path, tmp_path: Path) -> None:
    for name in ("fl.example.org", "localhost", "203.0.113.7", "127.0.0.1", "2001:db8::1"):
        assert verifies(made, "-verify_hostname" if name[-1].isalpha() else "-verify_ip", name), name
    assert not verifies(made, "-verify_hostname", "other.example.org")
    assert not verifies(made, "-verify_ip", "203.0.113.8")
    sh("credentials.sh", "ca", tmp_path)  # another authority does not vouch for it
    shutil.copy(made / "server.crt", tmp_path)
    assert not verifies(tmp_path)


def test_keys_are_the_owner_s_alone_flower_reads_them_and_none_is_overwritten(made: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()}
    public = dict.fromkeys(("ca.crt", "server.crt"), 0o644)
    assert modes == dict.fromkeys(("ca.key", "server.key", "site-a"), 0o600) | public | {
        "site-a.pub": modes["site-a.pub"]
    }
    private = load_ssh_private_key((made / "site-a").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == load_ssh_public_key((made / "site-a.pub").read_bytes())
    assert private.curve.name == "secp384r1"
    before = {path: path.read_bytes() for path in made.iterdir()}
    for words in (["ca"], ["server", "x"], ["node", "site-a"]):
        done = sh("credentials.sh", words[0], made, *words[1:])
        assert done.returncode == 2
        assert "is there already; move it away" in done.stderr
        assert {path: path.read_bytes() for path in made.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("credentials.sh ca", "usage: credentials.sh ca DIR"),
        ("credentials.sh cert DIR", "'cert' is none of: ca, server, node"),
        ("credentials.sh server DIR", "give the names and addresses"),
        ("credentials.sh server DIR x", "there is no .*ca.key; run: credentials.sh ca"),
        ("credentials.sh node DIR a b", "give one name"),
        ("credentials.sh node DIR a/b", "'a/b' cannot be a client's name"),
        ("superlink.sh", "usage: superlink.sh CREDENTIALS"),
        ("supernode.sh", "usage: supernode.sh CREDENTIALS"),
        ("superlink.sh DIR DIR/state", "cannot read DIR/server.crt; make it by credentials.sh"),
        ("supernode.sh DIR h:1 site-b DIR", "cannot read DIR/site-b; put it there"),
        ("supernode.sh DIR h:1 site-a DIR/none", "there is no folder DIR/none of images"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: str, told: str) -> None:
    for name in ("ca.crt", "site-a"):
        (tmp_path / name).touch()
    script, *others = words.split()
    done = sh(script, *(word.replace("DIR", str(tmp_path)) for word in others))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.match(f"{script}: error: .*{told.replace('DIR/', f'{tmp_path}/')}", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.crt", "site-a"]


@pytest.mark.parametrize(
    ("tool", "words"),
    [("openssl", ["ca"]), ("openssl", ["server", "fl.example.org"]), ("ssh-keygen", ["node", "site-b"])],
)
def test_a_failed_try_leaves_nothing_and_blocks_no_next_one(
    made: Path, tmp_path: Path, tool: str, words: list[str]
) -> None:
    """The tool writes part of its files, complains and fails."""
    folder = tmp_path / "keys"
    if words[0] == "server":
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns("server*", "site*"))
    before = [folder.exists(), *sorted(folder.rglob("*"))]
    broken = [f'"{shutil.which(tool)}" "$@" || true', 'echo "the disk is full" >&2', "exit 1"]
    a_program(tmp_path / "bin" / tool, *broken)
    done = sh("credentials.sh", words[0], folder, *words[1:], path=str(tmp_path / "bin"))
    assert done.returncode == 2
    assert re.fullmatch(".*the disk is full.*\n", done.stderr)
    assert [folder.exists(), *sorted(folder.rglob("*"))] == before
    assert sh("credentials.sh", words[0], folder, *words[1:]).returncode == 0


@pytest.mark.parametrize("script", ["superlink.sh", "supernode.sh"])
def test_a_service_s_files_are_its_user_s_alone(script: str) -> None:
    assert "\numask 077 " in (DEPLOY / script).read_text()
    unit = (DEPLOY / "systemd" / f"fedmitr-{script.removesuffix('.sh')}.service").read_text()
    assert "\nUMask=0077\n" in unit


def test_a_supernode_is_told_its_name_and_its_images(tmp_path: Path) -> None:
    """Flower's command is replaced by one that prints its words; blanks in a path survive."""
    images, keys, fake = tmp_path / "the images", tmp_path / "keys", tmp_path / "bin"
    images.mkdir()
    keys.mkdir()
    for name in ("ca.crt", "site-a"):
        (keys / name).touch()
    a_program(fake / "flower-supernode", 'for word in "$@"; do echo "$word"; done')
    script = tmp_path / "supernode.sh"
    script.write_text((DEPLOY / "supernode.sh").read_text().replace("$here/../.venv/bin", str(fake)))
    environment = {"PATH": "/usr/bin:/bin", "NODE_CONFIG": 'label-column="a finding"'}
    environment["SUPERNODE_OPTIONS"] = "--trusted-entities x.yaml"
    words = ["sh", script, keys, "fl.example.org:8443", "site-a", images, "9100"]
    said = subprocess.run(words, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    assert said[:2] == ["--trusted-entities", "x.yaml"]
    given = dict(zip(said[::2], said[1::2], strict=True))
    node = {"client-name": "site-a", "data-path": str(images), "label-column": "a finding"}
    assert parse_config_args([given["--node-config"]]) == node
    assert given["--superlink"] == "fl.example.org:8443"
    assert given["--auth-supernode-private-key"] == str(keys / "site-a")
    assert given["--port"] == "9100"


PATIENT = """
import contextlib, io, runpy, sqlite3, sys
sys.argv = ["patient.py", "flower-superlink", "--help"]
said = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
    runpy.run_path({script!r}, run_name="__main__")
from flwr.supercore import sql_mixin
connection = sqlite3.connect(":memory:")
sql_mixin._set_sqlite_pragmas(connection, None)
print(connection.execute("PRAGMA busy_timeout").fetchone()[0], "--database" in said.getvalue())
"""


def test_the_superlink_waits_longer_for_its_database() -> None:
    """Flower's own command has run in that process, and what opens its databases sets the other patience."""
    code = PATIENT.format(script=str(DEPLOY / "patient.py"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "25000 True\n", done.stderr
