"""The command line: words to settings, one line and status 2 for bad input, the table and the folder at the end."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from unittest.mock import Mock, patch

import jsonschema
import pytest
from tiny import ROOT

from fedmitr_flwr import cli, methods, pipeline
from fedmitr_flwr.cli import main
from fedmitr_flwr.common.errors import DataError, Failed, UserError
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.completion import settings
from fedmitr_flwr.config.presets import named_file, presets
from fedmitr_flwr.config.schema import limits
from fedmitr_flwr.flower.simulate import Options
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.runs.result import build

Call = tuple[object, ...]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    made: list[Call] = []

    def finish(folder: RunFolder) -> RunFolder:
        config = folder.config
        folder.write_result(build(config=config, device="cpu", bytes_up=[], seconds={}, student=61.0, local=[45.0]))
        return folder

    def run(config: Config, name: str | None) -> RunFolder:
        made.append(("run", config, name))
        return finish(RunFolder.create(Config.from_flat({"out-dir": str(tmp_path)}, config), name or "unnamed"))

    def fuse(run: RunFolder, method: str, overrides: Mapping[str, object]) -> RunFolder:
        made.append(("fuse", run.path, method, dict(overrides)))
        return finish(run.sub(method))

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(pipeline, "fuse", fuse)
    return made


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    found = re.fullmatch("fedmitr: error: (.*)\n", err)
    assert found, err
    return found[1]


def test_run_ends_with_the_table_and_the_folder(
    calls: list[Call], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0o022)
    try:
        assert main(["run", "--name", "first"]) == 0
    finally:
        os.umask(before)
    assert calls == [("run", Config(), "first")]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("fedmitr (student)              61.00") for line in lines)
    assert lines[-2:] == [f"run folder: {tmp_path / 'first'}", f"next: fedmitr report {tmp_path / 'first'}"]
    modes = {path.relative_to(tmp_path).as_posix(): oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    folders, files = ("first", "first/uploads", "first/uploads/refused"), ("first/config.toml", "first/result.json")
    assert modes == dict.fromkeys(folders, "0o700") | dict.fromkeys(files, "0o600")


def test_settings_stand_anywhere_and_win_over_the_file(calls: list[Call], tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text("seed = 1\n[local]\nlr = 0.25\nepochs = 3\n")
    wanted = Config.from_flat({"seed": 2, "local.lr": 0.5, "local.epochs": 3})
    for words in (
        "-c FILE seed=2 local.lr=0.5 --name n",
        "seed=2 -c FILE local.lr=0.5 --name n",
        "seed=2 local.lr=0.5 --name n --config FILE",
        "--name n seed=2 -c FILE local.lr=0.5",
        "--name=n seed=1 --config=FILE seed=2 local.lr=0.5",
    ):
        assert main(["run", *words.replace("FILE", str(file)).split()]) == 0
        assert calls.pop() == ("run", wanted, "n")
        shutil.rmtree(tmp_path / "n")
    file.write_text("data.source = 'parquet'\n")  # the command line gives what it needs
    assert main(["run", "-c", str(file), "data.path=/data"]) == 0
    assert calls == [("run", Config.from_flat({"data.source": "parquet", "data.path": "/data"}), None)]


def test_fuse_passes_only_what_was_asked(calls: list[Call], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(Config.from_flat({"out-dir": str(tmp_path), "model.patch-size": 4}), "first")
    file = tmp_path / "file.toml"
    file.write_text("distill.rounds = 2\n")
    assert main(["fuse", str(run.path), "--method", "fedavg", "-c", str(file), "relabel.mode=drop"]) == 0
    assert calls == [("fuse", run.path, "fedavg", {"distill.rounds": 2, "relabel.mode": "drop"})]
    assert capsys.readouterr().out.splitlines()[-2] == f"run folder: {run.path / 'fused' / 'fedavg-1'}"
    calls.clear()
    line = refused(capsys, "fuse", str(run.path), "--method", "fedavg", "model.img-size=10")
    assert "use a multiple of model.patch-size = 4" in line  # settings are checked on top of the run's own
    assert calls == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run sede=3", "unknown config key 'sede'; did you mean seed?"),
        ("run track=wand", 'use "" | tensorboard | wandb | mlflow; did you mean wandb?'),
        ("run inversion.prior=tw", "use tv, or the path of a .py file"),
        ("simulate --superlink federation", "config.toml has no [superlink.federation]; write it there"),
        ("run partition.alpha=0", "partition.alpha = 0.0 is not possible; use a number > 0"),
        ("run -c none.toml", "there is no config file none.toml; give the path of one"),
        ("run --seed 1", "unknown argument '--seed'; settings are words of the form key=value: seed=1"),
        ("fuse here --method fedavg --lr=0.1", "key=value: local.lr=0.1 or distill.lr=0.1"),
        ("run a.toml", "'a.toml' is not of the form key=value; for a file of settings write: -c a.toml"),
        ("run local.lr = 3", "'local.lr' is not of the form key=value; write it without spaces"),
        ("run -c a.toml -c b.toml", "-c is given twice; put the settings into one file"),
        ("run --nam x", "unknown argument '--nam'; did you mean --name?"),
        ("run --zzz x", "unknown argument '--zzz'; see fedmitr --help"),
        ("fuse nowhere --method fedavg", "nowhere is not a run folder (no config.toml)"),
        ("fuse", "the following arguments are required: RUN, --method"),
        ("central nowhere", "nowhere is not a run folder (no config.toml)"),
        ("central nowhere local.lr=1", "unknown argument 'local.lr=1'"),
        ("methods fedavg", "unknown argument 'fedavg'"),
        ("bench", "give a bench file, such as smoke, or --table and a folder; not both"),
        ("bench nowhere.toml", "there is no bench file nowhere.toml; give the path of one"),
        ("bench --table nowhere", "nowhere; give the path of one"),
        ("report nowhere", "nowhere; name one that `fedmitr run` or Flower printed"),
        ("predict nowhere", "the following arguments are required: IMAGE"),
        ("predict nowhere image.png", "nowhere is not a run folder (no config.toml)"),
        ("diagnose nowhere", "nowhere is not a run folder (no config.toml)"),
        ("train", "there is no command 'train'; see fedmitr --help"),
        ("reprot here", "there is no command 'reprot'; did you mean report?"),
        ("help reprot", "there is no command 'reprot'; did you mean report?"),
        ("run -c digitz", "digits, fashion_mnist; did you mean digits?"),
        ("run -c smoke", "smoke goes with `fedmitr bench`"),
        ("bench smok", "seeds, smoke; did you mean smoke?"),
        ("list nowhere", "nowhere; `fedmitr run` makes one, or give the folder of others"),
        ("simulate --clients 4 partition.clients=3", "--clients 4 and partition.clients=3; give one of them"),
        ("demo -c digits", "unknown argument '-c'; see fedmitr --help"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    calls: list[Call], capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert message in refused(capsys, *words.split())
    assert calls == []


def test_a_bad_file_is_named(calls: list[Call], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("local.lr = 'fast'\n")
    line = refused(capsys, "run", "-c", str(file))
    assert line == f"local.lr = 'fast' is text; it must be a number (with the settings of {file})"
    assert calls == []


def test_a_user_without_a_home_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("Could not determine home directory.")
    with patch.object(Path, "expanduser", side_effect=error):
        assert "HOME is not set" in refused(capsys, "run", "out-dir=~/runs")


def ended(capsys: pytest.CaptureFixture[str], error: BaseException, said: str = "") -> tuple[int, str]:
    """Status and last line of a run that logs this line and raises this error."""

    def run(*_: object) -> None:
        logging.getLogger("fedmitr").info("%s", said)
        raise error

    with patch.object(pipeline, "run", run):
        return main(["run"]), capsys.readouterr().err.splitlines()[-1]


def test_what_the_pipeline_refuses_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = DataError("class 'a\x1b]0;owned\x07\u202eb' is unknown,\n  in two lines")
    line = r"fedmitr: error: class 'a\x1b]0;owned\x07\u202eb' is unknown, in two lines"
    assert ended(capsys, error) == (2, line)
    with pytest.raises(ZeroDivisionError):
        ended(capsys, ZeroDivisionError())  # a mistake of ours keeps its traceback


def test_an_interrupted_run_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, KeyboardInterrupt(), "training") == (130, "fedmitr: interrupted")
    line = r"fedmitr: interrupted; go on with: fedmitr run ... resume-from=/runs/a\x1bb"
    assert ended(capsys, KeyboardInterrupt(), "run folder: /runs/a\x1bb") == (130, line)


def test_a_ctrl_c_within_code_in_a_string_ends_with_130_too(tmp_path: Path) -> None:
    """`python -m` marks it as unhandled, even where it is handled, and would end as killed by SIGINT."""
    script = """
        import sys
        from fedmitr_flwr import __main__ as ours, cli
        def run(_):
            exec("raise KeyboardInterrupt")
        cli._list = run
        sys.argv = ["fedmitr", "list"]
        sys.exit(ours.command())
    """
    (tmp_path / "ours.py").write_text(dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "ours"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "fedmitr: interrupted\n")


def test_methods_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"fedavg", "ensemble", "fedmitr"} <= {line.split()[0] for line in lines} == set(methods.available())
    assert all(len(line.split()) > 2 for line in lines)


def python(*words: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, check=False, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_help_does_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; from fedmitr_flwr.cli import main"
    done = python("-c", f"{code}; main(['--help'])")
    assert done.returncode == 0, done.stderr
    assert re.search(r"in Flower(.|\n)*fedmitr fuse", done.stdout)


def test_presets_go_by_name_and_files_before_them(
    calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10_deit").mkdir()  # a folder is no file of settings
    (tmp_path / "deployment").write_text("seed = 9")
    wanted = [Config.from_file(ROOT / "configs" / "digits.toml"), Config.from_flat({"seed": 9})]
    for name in ("digits", "deployment"):
        assert main(["run", "-c", name, "--name", f"by-{name}"]) == 0
    assert [call[1] for call in calls] == wanted
    assert named_file(Path("cifar10_deit")) == ROOT / "configs" / "cifar10_deit.toml"


def test_help_is_there_without_being_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for words, first in (([], "fedmitr "), (["help"], "fedmitr "), (["help", "run"], "fedmitr run ")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert (ended.value.code, capsys.readouterr().out.startswith(f"usage: {first}[-h]")) == (0, True)


def test_runs_are_listed_newest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.from_flat({"out-dir": str(tmp_path), "partition.clients": 3, "data.source": "digits"})
    for age, name in enumerate(("done", "begun", "other")):
        folder = RunFolder.create(config, name)
        if name == "done":
            result = build(config=config, device="cpu", bytes_up=[], seconds={}, student=61.0, fedavg=5.256)
            folder.write_result(result)
        if name == "other":
            (folder.path / "config.toml").write_text("seed")
        os.utime(folder.path / "config.toml", (age, age))
    assert main(["list", str(tmp_path)]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["run", "method", "data", "clients", "student", "FedAvg", "ensemble", "state"],
        ["other", "cannot", "be", "read"],
        ["begun", "fedmitr", "digits", "3", "0", "uploads,", "not", "finished"],
        ["done", "fedmitr", "digits", "3", "61.00", "5.26", "-", "finished"],
    ]


def test_simulate_passes_settings_and_options_and_ends_as_flower_did(capsys: pytest.CaptureFixture[str]) -> None:
    with patch("fedmitr_flwr.flower.simulate.simulate") as simulated:
        assert main(["demo", "--clients", "3", "seed=2", "--offline"]) == 0
        (config, options) = simulated.call_args.args
        preset = Config.from_file(ROOT / "configs" / "demo.toml")
        assert config == Config.from_flat({"seed": 2, "partition.clients": 3}, preset)
        assert options == Options(offline=True)
        told = {Failed("no\nway"): (1, "error: no way"), Failed("bad", 2): (2, "error: bad")}
        told |= {KeyboardInterrupt("start it again"): (130, "interrupted; start it again")}
        for error, (status, line) in told.items():
            simulated.side_effect = error
            assert (main(["simulate"]), capsys.readouterr().err) == (status, f"fedmitr: {line}\n")


def test_the_schema_says_what_the_checks_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    said = json.loads(capsys.readouterr().out)
    jsonschema.Draft7Validator.check_schema(said)
    valid = jsonschema.Draft7Validator(said).is_valid
    for path in presets("configs").values():
        assert valid(tomllib.loads(path.read_text(encoding="utf-8"))), path
    assert not valid({"local": {"epochz": 1}})
    tried = 0
    for key, limit in limits().items():
        section, _, name = key.rpartition(".")
        wrong = [limit[end] + step for end, step in (("minimum", -1), ("maximum", 1)) if end in limit]
        wrong += [limit["exclusiveMinimum"]] if "exclusiveMinimum" in limit else []
        for value in wrong or ["nonsense"]:
            assert not valid({section: {name: value}} if section else {name: value}), key
            with pytest.raises(UserError):
                methods.check(Config.from_flat({key: value}))
            tried += 1
    assert tried > 50


def test_keys_values_presets_and_commands_are_completed(tmp_path: Path) -> None:
    def completed(line: str) -> set[str]:
        asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "|"}
        asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"), "_ARGCOMPLETE_SHELL": "fish"}
        (tmp_path / "out").touch()
        done = subprocess.run(
            [sys.executable, "-m", "fedmitr_flwr"], cwd=ROOT, env=os.environ | asked, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return {word.strip() for word in (tmp_path / "out").read_text().split("|")}  # some versions end words

    assert completed("fedmitr re") == {"report"}
    assert completed("fedmitr run distill.e") == {"distill.epochs-per-round="}
    assert {"digits", "fashion_mnist"} <= completed("fedmitr run -c ")
    assert completed("fedmitr fuse x --method fedm") == {"fedmedian", "fedmitr"}
    assert settings("inversion.mode=") == [f"inversion.mode={mode}" for mode in ("dense", "sparse", "pri4")]
    assert settings("local.augment=t") == ["local.augment=true"]
    assert settings("model.weights=t") == ["model.weights=timm"]
    assert settings("local.lr=") == settings("nothing=") == []


def test_a_bench_gets_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Mock(return_value=1)
    monkeypatch.setitem(sys.modules, "fedmitr_flwr.bench.command", SimpleNamespace(bench=bench))
    words = ["bench", "file.toml", "grid.seed=[1, 2]", "--out", str(tmp_path), "local.epochs=3", "--any-code"]
    assert main([*words, "--known", "r.jsonl"]) == 1
    settings = {"grid.seed": [1, 2], "local.epochs": 3}
    switches = {"known": Path("r.jsonl"), "any_code": True, "verbose": False}
    bench.assert_called_once_with(Path("file.toml"), settings, tmp_path, None, **switches)


def test_a_reader_that_left_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from fedmitr_flwr import cli; cli._methods = print; sys.exit(cli.main(['methods']))"
    done = python("-c", code, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for encoding in ("ascii", "cp1252")]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    monkeypatch.setattr(cli, "_methods", lambda _: print("高い"))
    assert main(["methods"]) == 0
    assert main(["report", str(tmp_path / "高い")]) == 2
    for stream in streams:
        stream.flush()
        assert rb"\u9ad8\u3044" in stream.buffer.getvalue()
