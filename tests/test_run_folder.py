"""Run folders: what is written, what is refused, and what can be read back."""

import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import tiny
import torch

from fedmitr_flwr.common.errors import ConfigError, DiskError, RunError, UploadError
from fedmitr_flwr.common.files import load_tensors, write_text
from fedmitr_flwr.config import Config, recipe
from fedmitr_flwr.methods import rounds
from fedmitr_flwr.runs.checkpoints import Checkpoints
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


def sealed_file(folder: Path, text: str) -> Path:
    (folder / "config.toml").write_text(f"# checksum of what follows: {sha256(text.encode()).hexdigest()}\n{text}")
    return folder


def test_a_new_folder_holds_the_whole_config_and_opens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place is of the home folder or of the current one."""
    config = config_in(tmp_path / "deep" / "er", seed=7, **{"data.path": 'a "b" ü\n'})
    created = RunFolder.create(config, "run one")
    opened = RunFolder.open(str(created.path))
    assert opened.path == created.path == tmp_path / "deep" / "er" / "run one"
    assert opened.config == config
    assert (opened.finished, opened.load_uploads()) == (False, [])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for out_dir, place in (("", "fedmitr-runs"), ("~/other", "other"), ("runs", "runs")):
        assert RunFolder.create(Config(out_dir=out_dir), "x").path == tmp_path / place / "x"


def test_a_place_that_cannot_be_is_refused(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left alone, or the name gets a number, for two runs without a name may begin within one second."""
    before = (run.path / "config.toml").read_text()
    other = config_in(run.path.parent, seed=9)
    with pytest.raises(RunError, match=r"first exists; give another name"):
        RunFolder.create(other, "first")
    assert (run.path / "config.toml").read_text() == before
    assert [RunFolder.create(other, "first", or_next=True).path.name for _ in "ab"] == ["first-2", "first-3"]
    for name, why in (*((name, "use one word") for name in ("", ".", "..", "a/b", "/etc")), ("a\x1b[31m", "leave out")):
        with pytest.raises(RunError, match=f"is no name for a run folder; {why}"):
            RunFolder.create(config_in(tmp_path), name)
    with pytest.raises(RunError, match=r"File name too long; set the path to another path"):
        RunFolder.open(tmp_path / ("x" * 300))
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot make the run folder .*Not a directory; set out-dir"):
        RunFolder.create(config_in(tmp_path / "file"), "x")
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(RunError, match=r"cannot make the run folder .*Permission denied; set out-dir to a folder that"):
        RunFolder.create(config_in(tmp_path), "x")


def test_other_folders_are_no_runs(tmp_path: Path) -> None:
    """Nor is one with a model of other heads: its weights would fit, and mean nothing."""
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunError, match=rf"{path} is not a run folder \(no config.toml\)"):
            RunFolder.open(path)
    (tmp_path / "config.toml").write_text("sead = 3")
    with pytest.raises(RunError, match=r"config\.toml is not whole: it has 1 settings and no checksum; restore it"):
        RunFolder.open(tmp_path)
    assert RunFolder.open(sealed_file(tmp_path, Config().to_toml() + "model.heads = 4\n")).config == Config()
    sealed_file(tmp_path, Config().to_toml() + "model.heads = 2\n")
    with pytest.raises(ConfigError, match=r"model\.heads = 2 of model\.width = 64, and this version has .*; use the v"):
        RunFolder.open(tmp_path)


def test_settings_of_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is retired, absent or renamed is named, and today's defaults stand in its place; or it is refused."""

    def opened(*changes: tuple[str, str]) -> Config:
        caplog.clear()
        text = Config().to_toml()
        for now, then in changes:
            assert now in text
            text = text.replace(now, then)
        return RunFolder.open(sealed_file(tmp_path, text)).config

    unknown = ("seed = 0", 'seed = 7\ndistill.gone = "x"'), ('relabel.mode = "tokens"\n', "")
    with pytest.raises(ConfigError, match=r"config\.toml: unknown config key 'distill\.gone'; a newer version made"):
        opened(*unknown)
    with patch("fedmitr_flwr.runs.folder.RETIRED", {"distill.gone": "it is 1 for all"}):
        assert opened(*unknown) == recipe.settled(Config(seed=7))
    retired, absent = caplog.messages
    assert retired.endswith("settings of an older version, ignored: distill.gone")
    assert absent.endswith("settings that it was made without have their defaults: relabel.mode")
    assert opened(('upload.extras = ""', "upload.directions = 8")).upload.extras == ""
    assert caplog.messages[0].endswith("moments in 8 directions are left aside, for this version uses 32")
    rebirths = 'inversion.mode = "sparse"', 'inversion.mode = "pri"\ninversion.rebirths = 4'
    found = opened(rebirths)
    assert found == Config.from_flat({"inversion.mode": "pri4"})
    assert caplog.messages[0].endswith("settings of an older version, ignored: inversion.rebirths")
    older = "; an older version made this run, so use that one"
    with pytest.raises(ConfigError, match=rf"config\.toml: inversion\.mode = 'pri' is not possible; use .*{older}"):
        opened(rebirths, ("rebirths = 4", "rebirths = 7"))
    joint = ('combine = "probs"', 'combine = "joint"'), ('relabel.mode = "tokens"', 'relabel.mode = "complement"')
    assert opened(rebirths, *joint) == recipe.settled(found)
    said = "choices of an older version, in whose place are today's defaults: ensemble.combine = 'joint', relabel.mode"
    assert said in caplog.messages[-1]


def test_a_folder_has_one_writer_and_no_stale_lock(run: RunFolder) -> None:
    """Within a process, too; the file that is left behind by what was killed locks nothing."""
    (run.path / ".lock").touch()
    other = RunFolder.open(run.path)
    with run.locked(), run.at_work(), pytest.raises(RunError, match=r"another process is at work in .*first; wait"):
        other.locked().__enter__()
    with other.locked(), pytest.raises(RunError, match="another process"):
        run.locked().__enter__()


def test_a_file_or_folder_is_written_out_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's folder is written out behind the rename, for a power cut; only a full disk asks for room."""
    done: list[str] = []
    sync, rename = os.fsync, Path.replace
    inode = {tmp_path.stat().st_ino: "folder"}
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(inode.get(os.fstat(fd).st_ino, "file")), sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda own, to: (done.append("rename"), rename(own, to))[1])
    write_text(tmp_path / "x", "text")
    assert done == ["file", "rename", "folder"]
    with pytest.raises(DiskError, match=r"No such file or directory.*; mend that, and go on with resume-from"):
        write_text(tmp_path / "none" / "x", "y")
    with patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(DiskError, match=r"No space left on device; make room there, and go on with resume-from"):
            write_text(tmp_path / "y", "y")
        with pytest.raises(RunError, match=r"cannot make the run folder .*No space left on device; make room there"):
            RunFolder.create(config_in(tmp_path / "deep" / "er"), "x")
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]
    (tmp_path / "old").mkdir()  # an older version has left it there
    assert RunFolder.open(RunFolder.create(config_in(tmp_path), "old").path).config == config_in(tmp_path)


def test_uploads_come_back_in_the_clients_order(run: RunFolder) -> None:
    for client in (2, 0, 3):
        path = run.save_upload(an_upload(client))
        assert path == run.path / "uploads" / f"client_{client:03}.safetensors"
    (run.uploads_path / ".client_001.safetensors.7.tmp").write_text("cut off while it was written")
    shutil.copy(run.uploads_path / "client_002.safetensors", run.uploads_path / "client_01.safetensors")
    assert list(run.upload_paths()) == [0, 2, 3]
    assert [(upload.client, upload.num_examples) for upload in run.load_uploads()] == [(0, 10), (2, 12), (3, 13)]
    assert run.missing() == [1]
    with pytest.raises(RunError, match="client 3 has uploaded already"):
        run.save_upload(an_upload(3))
    path.rename(run.save_upload(an_upload(12)))
    with pytest.raises(RunError, match=r"client_012\.safetensors holds the upload of client 3"):
        run.load_uploads()
    (run.uploads_path / "client_012.safetensors").unlink()
    run.save_upload(an_upload(12))
    with pytest.raises(UploadError, match=r"client 12: there are only the clients 0 to 3"):
        run.load_uploads()


def test_a_refused_upload_is_kept_with_its_reason(run: RunFolder) -> None:
    weights = {"w": torch.tensor([float("nan"), 1.0])}
    paths = [run.refuse_upload("client 3", weights, "client 3: NaN in 'w'", {"metrics": "{}"})]
    paths += [run.refuse_upload(who, {}, "again") for who in ("client 3", "../../etc")]
    assert [path.name for path in paths] == ["client_3.safetensors", "client_3-2.safetensors", "etc.safetensors"]
    assert {path.parent for path in paths} == {run.refused_path}
    tensors, header = load_tensors(paths[0])
    assert header == {"from": "client 3", "reason": "client 3: NaN in 'w'", "said": {"metrics": "{}"}}
    assert tensors["w"][1] == 1
    assert run.upload_paths() == {}


def test_the_quorum_line_names_the_missing_and_the_fix(run: RunFolder) -> None:
    for client in (0, 2):
        run.save_upload(an_upload(client))
    run.config = config_in(run.path.parent, **{"flower.quorum": 0.5})
    assert [upload.client for upload in run.require_uploads()] == [0, 2]
    run.config = config_in(run.path.parent)
    fix = f"run with resume-from = '{run.path}' to ask only them, or lower flower.quorum"
    with pytest.raises(RunError, match=f"^2 of 4 uploads are in .* and 4 are needed; missing: clients 1, 3; {fix}$"):
        run.require_uploads()


def test_fusions_have_their_own_files_and_the_parents_uploads(run: RunFolder) -> None:
    run.save_upload(an_upload(0))
    fused = [run.sub("fedavg"), run.sub("fedavg"), run.sub("ensemble")]
    fused.append(fused[0].sub("fedavg"))
    names = ["fedavg-1", "fedavg-2", "ensemble-1", "fedavg-3"]
    assert [folder.path for folder in fused] == [run.path / "fused" / name for name in names]
    for folder in fused:
        again = RunFolder.open(folder.path)
        assert again.root == run.path
        assert list(again.upload_paths()) == [0]
        assert again.model_path.parent == folder.path
    assert RunFolder.open(fused[0].path).config == Config.from_flat({"method": "fedavg"}, run.config)
    config = Config.from_flat({"method": "fedmitr", "relabel.mode": "drop"}, run.config)
    assert RunFolder.open(run.sub("fedmitr", config).path).config == config
    elsewhere = RunFolder.create(config_in(run.path.parent / "fused"), "x")  # a place of this name makes no fusion
    assert elsewhere.root == elsewhere.path


def test_metrics_are_appended_line_by_line(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log_metrics(stage="distill", epoch=1, loss=torch.tensor(0.5), alive=(0.25, float("nan")))
    run.log_metrics(stage="distill", epoch=2, loss={3: (torch.arange(2), [float("-inf")])})
    lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"stage": "distill", "epoch": 1, "loss": 0.5, "alive": [0.25, None]},
        {"stage": "distill", "epoch": 2, "loss": {"3": [[0, 1], [None]]}},
    ]
    monkeypatch.setattr("builtins.open", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: No space left"):
        run.log_metrics(loss=1.0)


def test_the_model_and_its_arguments_are_for_the_owner_alone(run: RunFolder) -> None:
    weights = {"head.bias": torch.tensor([1.5, -2.0])}
    arguments = {"architecture": "vit_tiny_patch16_224", "num_classes": 10}
    run.save_model(weights, arguments)
    once = run.model_path.read_bytes()
    run.save_model(weights, arguments)
    assert run.model_path.read_bytes() == once
    assert tiny.same(load_tensors(run.model_path)[0], weights)
    assert json.loads((run.path / "config.json").read_text()) == arguments
    run.save_upload(an_upload(0))
    run.log_metrics(stage="x")
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in (run.path, *run.path.rglob("*"))}
    assert modes == {(True, 0o700), (False, 0o600)}


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


def test_pieces_come_back_under_their_own_name_and_method_only(run: RunFolder) -> None:
    """And nothing is kept without a folder."""
    of = "piece", ("seed",)
    nowhere = Checkpoints(None, run.config, [an_upload(0)], torch.device("cpu"))
    nowhere.save(*of, {"x": torch.ones(1)})
    kept = replace(nowhere, folder=run.work_path)
    assert [each.load(*of) for each in (nowhere, kept)] == [None, None]
    kept.save(*of, {}, words=["a"], number=0.1)
    assert kept.load(*of) == ({}, {"words": ["a"], "number": 0.1})
    assert kept.load("piece", ("seed", "model.")) is None
    settings = {"seed": 3}, {"method": "fedavg"}, {"model.depth": 3}
    seed, method, depth = (replace(kept, config=Config.from_flat(changes, run.config)) for changes in settings)
    others = [seed, method, replace(kept, device=torch.device("cuda")), replace(kept, threads=kept.threads + 1)]
    assert [other.load(*of) for other in others] == [None] * 4
    assert depth.load(*of) == kept.load(*of)
    (run.work_path / "piece.safetensors").rename(run.work_path / "other.safetensors")
    assert kept.load("other", ("seed",)) is None


def test_every_setting_is_known_to_decide_a_piece_or_not() -> None:
    """A new setting belongs into one of these lists."""
    elsewhere = ("device", "threads", "method")  # in every key already
    no_piece = ("out-dir", "resume-from", "track", "evaluate.", "flower.", "strategy.", "feddf.", "krum.", "screen.")
    no_piece += ("workers", "ray-address")  # the same bits by any
    in_uploads = ("data.", "partition.", "local.", "upload.", "privacy.")  # which are in the key themselves
    for key in Config().to_flat():
        assert key.startswith((*rounds.STUDENT_SETTINGS, *elsewhere, *no_piece, *in_uploads)), key
    assert set(rounds.IMAGE_SETTINGS) < set(rounds.STUDENT_SETTINGS)
