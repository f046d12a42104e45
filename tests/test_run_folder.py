"""Run folders: what is written, what is refused, and what can be read back."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from fedmitr_flwr.common.errors import ConfigError, DiskError, RunError, UploadError
from fedmitr_flwr.common.files import load_tensors, write_text
from fedmitr_flwr.config import Config, recipe
from fedmitr_flwr.config.limits import needed
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.uploads.upload import Upload


def config_in(folder: Path, **flat: object) -> Config:
    small = {"model.num-classes": 10, "model.width": 16, "model.depth": 1, "partition.clients": 4}
    return Config.from_flat({"out-dir": str(folder), **tiny.SIZES, **small, **flat})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(config_in(tmp_path), "first")


def an_upload(client: int) -> Upload:
    return tiny.an_upload(config_in(Path()), client, 10 + client)


def test_a_new_folder_holds_the_complete_config_and_opens_again(tmp_path: Path) -> None:
    config = config_in(tmp_path / "deep" / "er", seed=7, **{"data.path": 'a "b" ü\n'})
    created = RunFolder.create(config, "run one")
    assert created.path == tmp_path / "deep" / "er" / "run one"
    opened = RunFolder.open(str(created.path))
    assert opened.path == created.path
    assert opened.config == config
    assert not opened.finished
    assert opened.load_uploads() == []


def test_a_place_is_of_the_home_folder_or_of_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create(Config(), "x").path == tmp_path / "fedmitr-runs" / "x"
    assert RunFolder.create(Config(out_dir="~/other"), "x").path == tmp_path / "other" / "x"
    assert RunFolder.create(Config(out_dir="runs"), "x").path == tmp_path / "runs" / "x"


def test_an_existing_folder_is_left_alone(run: RunFolder) -> None:
    before = (run.path / "config.toml").read_text()
    with pytest.raises(RunError, match=r"first exists; give another name"):
        RunFolder.create(config_in(run.path.parent, seed=9), "first")
    assert (run.path / "config.toml").read_text() == before


@pytest.mark.parametrize(
    ("name", "why"),
    [*((name, "use one word") for name in ("", ".", "..", "a/b", "/etc")), ("a\x1b[31m", "leave out control")],
)
def test_names_that_are_paths_or_cannot_be_shown_are_refused(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(RunError, match=f"is no name for a run folder; {why}"):
        RunFolder.create(config_in(tmp_path), name)


def test_a_parent_that_cannot_hold_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot make the run folder .*Not a directory; set out-dir"):
        RunFolder.create(config_in(tmp_path / "file"), "x")
    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(RunError, match=r"cannot make the run folder .*Permission denied; set out-dir to a folder that"):
        RunFolder.create(config_in(tmp_path), "x")


def test_other_folders_are_no_runs(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunError, match=rf"{path} is not a run folder \(no config.toml\)"):
            RunFolder.open(path)
    (tmp_path / "config.toml").write_text("sead = 3")
    with pytest.raises(RunError, match=r"config\.toml is not whole: it has 1 settings and no checksum; restore it"):
        RunFolder.open(tmp_path)


def sealed_file(folder: Path, text: str) -> Path:
    (folder / "config.toml").write_text(f"# checksum of what follows: {sha256(text.encode()).hexdigest()}\n{text}")
    return folder


def test_settings_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Retired keys are named and ignored, absent ones named and at their defaults; a newer version's are refused."""
    text = Config().to_toml().replace("seed = 0", "seed = 7").replace('relabel.mode = "tokens"\n', "")
    sealed_file(tmp_path, text + 'distill.gone = "x"\n')
    with pytest.raises(ConfigError, match=r"config\.toml: unknown config key 'distill\.gone'; a newer version made"):
        RunFolder.open(tmp_path)
    monkeypatch.setattr("fedmitr_flwr.runs.folder.RETIRED", {"distill.gone": "it is 1 for all"})
    assert RunFolder.open(tmp_path).config == recipe.settled(Config(seed=7))
    retired, absent = caplog.messages
    assert retired.endswith("settings of an older version, ignored: distill.gone")
    assert absent.endswith("settings that it was made without have their defaults: relabel.mode")


def test_values_that_an_older_version_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What has another name now is taken; what is gone is named, with today's default in its place, or refused."""
    moments = Config().to_toml().replace('upload.extras = ""', "upload.directions = 8")
    assert RunFolder.open(sealed_file(tmp_path, moments)).config.upload.extras == ""
    assert caplog.messages[0].endswith("moments in 8 directions are left aside, for this version uses 32")
    caplog.clear()
    text = Config().to_toml().replace('inversion.mode = "sparse"', 'inversion.mode = "pri"\ninversion.rebirths = 4')
    found = RunFolder.open(sealed_file(tmp_path, text)).config
    assert found == Config.from_flat({"inversion.mode": "pri4"})
    assert caplog.messages[0].endswith("settings of an older version, ignored: inversion.rebirths")
    older = "; an older version made this run, so use that one"
    with pytest.raises(ConfigError, match=rf"config\.toml: inversion\.mode = 'pri' is not possible; use .*{older}"):
        RunFolder.open(sealed_file(tmp_path, text.replace("rebirths = 4", "rebirths = 7")))
    joint = text.replace('ensemble.combine = "probs"', 'ensemble.combine = "joint"')
    joint = joint.replace('relabel.mode = "tokens"', 'relabel.mode = "complement"')
    caplog.clear()
    assert RunFolder.open(sealed_file(tmp_path, joint)).config == recipe.settled(found)
    said = "choices of an older version, in whose place are today's defaults: ensemble.combine = 'joint', relabel.mode"
    assert said in caplog.messages[-1]


@pytest.mark.parametrize(("heads", "opens"), [(4, True), (2, False)])
def test_a_model_with_other_heads_is_no_model_of_this_version(tmp_path: Path, heads: int, opens: bool) -> None:
    """Its weights would fit, and mean nothing."""
    sealed_file(tmp_path, Config().to_toml() + f"model.heads = {heads}\n")
    if opens:
        assert RunFolder.open(tmp_path).config == Config()
        return
    with pytest.raises(ConfigError, match=r"model\.heads = 2 of model\.width = 64, and this version has .*; use the v"):
        RunFolder.open(tmp_path)


def test_a_folder_has_one_writer_and_no_stale_lock(run: RunFolder) -> None:
    """Within a process, too; what is killed holds nothing."""
    other = RunFolder.open(run.path)
    with run.locked(), run.at_work(), pytest.raises(RunError, match=r"another process is at work in .*first; wait"):
        other.locked().__enter__()
    script = (
        "import os, signal, sys; from fedmitr_flwr.runs.folder import RunFolder\n"
        "with RunFolder.open(sys.argv[1]).locked(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(run.path)], check=False).returncode == -9
    assert (run.path / ".lock").exists()
    with other.locked(), pytest.raises(RunError, match="another process"):
        run.locked().__enter__()


def test_only_the_owner_may_look(run: RunFolder) -> None:
    run.save_upload(an_upload(0))
    run.log_metrics(stage="x")
    run.save_model({"head.bias": torch.ones(1)}, {})
    assert run.path.stat().st_mode & 0o777 == 0o700
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: None) -> None:
    del full_disk
    with pytest.raises(RunError, match=r"cannot make the run folder .*No space left on device; make room there"):
        RunFolder.create(config_in(tmp_path / "deep" / "er"), "x")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "x").mkdir()  # what an older version has left there
    assert RunFolder.open(RunFolder.create(config_in(tmp_path), "x").path).config == config_in(tmp_path)


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    """Two runs without a name may begin within one second."""
    names = [RunFolder.create(config_in(tmp_path), "x", or_next=True).path.name for _ in range(3)]
    assert names == ["x", "x-2", "x-3"]


def test_without_a_home_folder_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", none)
    with pytest.raises(RunError, match=r"cannot look at '~/fedmitr-runs': Could not .*; set out-dir to a path that"):
        RunFolder.create(Config(), "x")
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"File name too long; set the path to another path"):
        RunFolder.open(tmp_path / ("x" * 300))


def test_names_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's folder is written out behind the rename."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace
    inode = {tmp_path.stat().st_ino: "folder"}
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(inode.get(os.fstat(fd).st_ino, "file")), sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda own, to: (done.append("rename"), replace(own, to))[1])
    write_text(tmp_path / "x", "text")
    assert done == ["file", "rename", "folder"]


def test_uploads_come_back_in_the_clients_order(run: RunFolder) -> None:
    for client in (2, 0, 3):
        path = run.save_upload(an_upload(client))
        assert path == run.path / "uploads" / f"client_{client:03}.safetensors"
    (run.uploads_path / ".client_001.safetensors.7.tmp").write_text("cut off while it was written")
    shutil.copy(run.uploads_path / "client_002.safetensors", run.uploads_path / "client_01.safetensors")
    assert list(run.upload_paths()) == [0, 2, 3]
    assert [(upload.client, upload.num_examples) for upload in run.load_uploads()] == [(0, 10), (2, 12), (3, 13)]
    assert run.missing() == [1]
    run.save_upload(an_upload(12))
    with pytest.raises(UploadError, match=r"client 12: there are only the clients 0 to 3"):
        run.load_uploads()


def test_a_client_uploads_once_and_under_its_own_number(run: RunFolder) -> None:
    path = run.save_upload(an_upload(1))
    with pytest.raises(RunError, match="client 1 has uploaded already"):
        run.save_upload(an_upload(1))
    path.rename(run.uploads_path / "client_000.safetensors")
    with pytest.raises(RunError, match=r"client_000\.safetensors holds the upload of client 1"):
        run.load_uploads()


def test_a_refused_upload_is_kept_with_its_reason(run: RunFolder) -> None:
    weights = {"w": torch.tensor([float("nan"), 1.0])}
    first = run.refuse_upload("client 3", weights, "client 3: NaN in 'w'", {"metrics": "{}"})
    second = run.refuse_upload("client 3", {}, "again")
    assert (first.name, second.name) == ("client_3.safetensors", "client_3-2.safetensors")
    tensors, header = load_tensors(first)
    assert header == {"from": "client 3", "reason": "client 3: NaN in 'w'", "said": {"metrics": "{}"}}
    assert tensors["w"][1] == 1
    assert run.refuse_upload("../../etc", {}, "x").parent == run.refused_path
    assert run.upload_paths() == {}


@pytest.mark.parametrize(
    ("quorum", "clients", "fewest"),
    [(1.0, 4, 4), (0.75, 4, 3), (0.5, 4, 2), (0.51, 4, 3), (0.01, 4, 1), (0.07, 100, 7)],
)
def test_a_quorum_in_uploads(quorum: float, clients: int, fewest: int) -> None:
    """0.07 * 100 is 7.000000000000001 in floating point: seven of a hundred are enough."""
    assert needed(quorum, clients) == fewest


def test_the_quorum_line_names_the_missing_and_the_fix(run: RunFolder) -> None:
    for client in (0, 2):
        run.save_upload(an_upload(client))
    run.config = config_in(run.path.parent, **{"flower.quorum": 0.5})
    assert [upload.client for upload in run.require_uploads()] == [0, 2]
    run.config = config_in(run.path.parent)
    with pytest.raises(RunError) as caught:
        run.require_uploads()
    assert str(caught.value) == (
        f"2 of 4 uploads are in {run.uploads_path} and 4 are needed; missing: clients 1, 3; "
        f"run with resume-from = '{run.path}' to ask only them, or lower flower.quorum"
    )


def test_fusions_have_their_own_files_and_the_parents_uploads(run: RunFolder) -> None:
    run.save_upload(an_upload(0))
    fused = [run.sub("fedavg"), run.sub("fedavg"), run.sub("ensemble")]
    assert [folder.path.relative_to(run.path).as_posix() for folder in fused] == [
        "fused/fedavg-1",
        "fused/fedavg-2",
        "fused/ensemble-1",
    ]
    for folder in fused:
        again = RunFolder.open(folder.path)
        assert again.root == run.path
        assert list(again.upload_paths()) == [0]
        assert again.model_path.parent == folder.path
    assert RunFolder.open(fused[0].path).config == Config.from_flat({"method": "fedavg"}, run.config)
    assert fused[0].sub("fedavg").path == run.path / "fused" / "fedavg-3"
    config = Config.from_flat({"method": "fedmitr", "relabel.mode": "drop"}, run.config)
    assert RunFolder.open(run.sub("fedmitr", config).path).config == config
    elsewhere = RunFolder.create(config_in(run.path.parent / "fused"), "x")  # a place of this name makes no fusion
    assert elsewhere.root == elsewhere.path


def test_metrics_are_appended_line_by_line(run: RunFolder) -> None:
    run.log_metrics(stage="distill", epoch=1, loss=torch.tensor(0.5), alive=(0.25, float("nan")))
    run.log_metrics(stage="distill", epoch=2, loss={3: (torch.arange(2), [float("-inf")])})
    lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"stage": "distill", "epoch": 1, "loss": 0.5, "alive": [0.25, None]},
        {"stage": "distill", "epoch": 2, "loss": {"3": [[0, 1], [None]]}},
    ]


def test_result_round_trip(run: RunFolder) -> None:
    with pytest.raises(RunError, match=r"has no result.json: the run has not ended"):
        run.read_result()
    accuracy = {"student": 61.25, "fedavg": None, "ensemble": 7, "local": [], "per_class": {"Käse": None}}
    result: dict[str, object] = {"method": "x", "accuracy": accuracy, "seconds": {}, "config": {"seed": 1}}
    nan = {"accuracy": accuracy | {"per_class": {"Käse": float("nan")}}}
    run.write_result(result | nan | {"counts": [(1, 2)]})
    assert run.finished
    assert run.read_result() == result | {"counts": [[1, 2]]}
    text = run.result_path.read_text()
    wrong = {"{": "cannot read", text.replace("61.25", "61.26"): "its checksum differs", "[]": "it is no table"}
    wrong |= {json.dumps({**result, key: []}): f"its {key!r} is not that of a run" for key in result}
    for content, reason in wrong.items():
        run.result_path.write_text(content)
        with pytest.raises(RunError, match=rf"cannot read .*result\.json.*{reason}|{reason} .*result\.json"):
            run.read_result()


def test_the_model_and_its_arguments(run: RunFolder) -> None:
    weights = {"head.bias": torch.tensor([1.5, -2.0])}
    arguments = {"model_name": "vit_tiny_patch16_224", "img_size": 96, "num_classes": 10}
    run.save_model(weights, arguments)
    once = run.model_path.read_bytes()
    run.save_model(weights, arguments)
    assert run.model_path.read_bytes() == once
    assert torch.equal(load_tensors(run.model_path)[0]["head.bias"], weights["head.bias"])
    assert json.loads((run.path / "model.json").read_text()) == arguments


def test_metrics_that_cannot_be_written_are_one_line(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: No space left"):
        run.log_metrics(loss=1.0)


def test_uploads_that_do_not_fit_are_refused_before_anybody_is_asked(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=30_000_000))
    run.require_room(3, 10_000_000)
    run.require_room(0, 10**12)
    with pytest.raises(DiskError, match=r"has 30 MB free, and 4 uploads take 40 MB; make room there, or set out-dir"):
        run.require_room(4, 10_000_000)


def test_only_a_full_disk_asks_for_room(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with pytest.raises(DiskError, match=r"No such file or directory.*; mend that, and go on with resume-from"):
        write_text(tmp_path / "none" / "x", "y")
    request.getfixturevalue("full_disk")
    with pytest.raises(DiskError, match=r"No space left on device; make room there, and go on with resume-from"):
        write_text(tmp_path / "x", "y")
    assert not list(tmp_path.iterdir())
