"""A server phase that was killed goes on behind its last finished piece, and ends in the bytes of one that was not."""

import logging
import os
import shutil
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import settings

from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import RunError
from fedmitr_flwr.config import Config
from fedmitr_flwr.methods import contract, fedmitr, rounds
from fedmitr_flwr.runs import checkpoints
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.uploads.upload import load, save

EPOCHS, BATCHES = 3, 3  # of 5, 5 and 2 images
ALL = EPOCHS * BATCHES, EPOCHS
SHAPE = {"inversion.steps": 4, "distill.rounds": EPOCHS, "distill.images-per-round": 12, "inversion.batch-size": 5}
SHAPE |= {"distill.epochs-per-round": 2, "model.depth": 1, "data.test-limit": 10}
PRI4 = {"inversion.mode": "pri4", "distill.images-per-round": 48}
MERGED = {"distill.init": "classwise"}  # a start made on the first images
OUTPUTS = ("model.safetensors", "pool.safetensors")


class KilledError(Exception):
    """Stands for a power cut."""


def power_cut(*_: object) -> None:
    raise KilledError


class Phase:
    """The server phases of a test: they count what is done, and die after as much of it as they are told."""

    def __init__(self, trained: RunFolder, out: Path, known: dict[str, list[bytes]]) -> None:
        self.trained, self.out, self.known = trained, out, known
        self.reset()

    def reset(self, left: int = 10**6) -> None:
        self.batches, self.epochs, self.left = 0, 0, left

    def spend(self) -> None:
        if not self.left:
            raise KilledError
        self.left -= 1

    def start(self, name: str = "run", **changes: object) -> RunFolder:
        """A run folder with uploads and nothing else."""
        config = Config.from_flat({"method": "fedmitr", "out-dir": str(self.out), **changes}, base=self.trained.config)
        folder = RunFolder.create(config, name)
        shutil.copytree(self.trained.uploads_path, folder.uploads_path, dirs_exist_ok=True)
        return folder

    def kill(self, folder: RunFolder, after: int = BATCHES + 2) -> None:
        """Start, and die in the middle of the piece after so many new ones."""
        self.reset(after)
        with pytest.raises(KilledError):
            pipeline.serve(RunFolder.open(folder.path))
        assert not folder.finished

    def end(self, folder: RunFolder) -> tuple[int, int]:
        """Serve to the end, as a new process would; how many batches and epochs that took."""
        self.reset()
        pipeline.serve(RunFolder.open(folder.path))
        assert not folder.work_path.exists()
        return self.batches, self.epochs

    def undisturbed(self, folder: RunFolder, **changes: object) -> bool:
        """Whether the outputs are the bytes of a phase with these settings that was not killed."""
        if repr(changes) not in self.known:
            whole = self.start("whole", **changes)
            self.end(whole)
            self.known[repr(changes)] = outputs(whole)
        return outputs(folder) == self.known[repr(changes)]


def outputs(folder: RunFolder) -> list[bytes]:
    return [(folder.path / name).read_bytes() for name in OUTPUTS]


@pytest.fixture(scope="module")
def known() -> dict[str, list[bytes]]:
    return {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that has its uploads; read only."""
    where = {"out-dir": str(tmp_path_factory.mktemp("trained")), "partition.clients": 3, "method": "fedavg"}
    return pipeline.run(settings(**SHAPE | where), "run")


@pytest.fixture
def phase(trained: RunFolder, tmp_path: Path, known: dict[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> Phase:
    """The inversion or distillation after the last that is `left` is killed in its middle."""
    phase = Phase(trained, tmp_path, known)
    invert, distil = fedmitr.invert, rounds.distil

    def spy_invert(*given: Any, on_step: Any, **more: Any) -> Any:
        steps = count(1)

        def step(*values: float) -> None:
            on_step(*values)
            if next(steps) == 3:
                phase.spend()

        inverted = invert(*given, on_step=step, **more)
        phase.batches += 1
        return inverted

    def spy_distil(*given: Any) -> None:
        *before, on_batch, plain, workers = given
        batches = count(1)

        def batch(*values: Any) -> None:
            on_batch(*values)
            if next(batches) == 2:
                phase.spend()

        distil(*before, batch, plain, workers)
        phase.epochs += 1

    monkeypatch.setattr(fedmitr, "invert", spy_invert)
    monkeypatch.setattr(rounds, "distil", spy_distil)
    return phase


@pytest.mark.parametrize(
    ("kind", "after", "made"),
    [
        ({}, 0, ALL),  # in the first batch
        (PRI4, 1, (ALL[0] - 1, EPOCHS)),  # in the second
        (MERGED, BATCHES, (ALL[0] - BATCHES, EPOCHS)),  # in the first distillation
        (PRI4, BATCHES + 3, (ALL[0] - BATCHES - 2, EPOCHS - 1)),  # in the last batch of the second epoch
        (MERGED, EPOCHS * (BATCHES + 1) - 1, (0, 1)),  # in the last distillation
    ],
)
def test_a_killed_phase_makes_what_is_missing_and_ends_in_the_same_bytes(
    phase: Phase, kind: dict[str, object], after: int, made: tuple[int, int]
) -> None:
    folder = phase.start(**kind)
    phase.kill(folder, after)
    assert phase.end(folder) == made
    assert phase.undisturbed(folder, **kind)


@pytest.mark.parametrize("after", [2, BATCHES + 3])
def test_so_does_one_that_made_batches_side_by_side(phase: Phase, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """How many were done when the power went is chance here; the bytes are not, and are those of one thread.

    Sums of larger models are split by thread: a batch alone must not get those of the others, or its bits differ.
    """
    asked: list[int] = []
    side_by_side = rounds.side_by_side
    monkeypatch.setattr(rounds, "side_by_side", lambda jobs: [asked.append(jobs), side_by_side(jobs)][1])
    folder = phase.start(threads=2, **{"data.flip": True})
    phase.kill(folder, after)
    phase.end(folder)
    assert set(asked) == {BATCHES}
    assert phase.undisturbed(folder, **{"data.flip": True})


def test_a_phase_that_dies_after_every_piece_gets_there(phase: Phase) -> None:
    folder = phase.start()
    folder.work_path.write_text("x")
    with pytest.raises(RunError, match=r"cannot make the folder .*work: "):
        pipeline.serve(folder)
    folder.work_path.unlink()
    for _ in range(EPOCHS * (BATCHES + 1) - 1):
        phase.kill(folder, after=1)
    assert phase.end(folder) == (0, 1)
    assert phase.undisturbed(folder)


@pytest.mark.parametrize(
    ("owner", "name", "pieces", "made"),
    [
        (pipeline, "compare", ALL[0] + 1, (0, 0)),  # in its evaluation: with all images and the student
        (os, "fsync", 0, ALL),  # while a piece is written, which does not count
    ],
)
def test_a_phase_killed_in_its_evaluation_only_evaluates(
    phase: Phase, owner: object, name: str, pieces: int, made: tuple[int, int]
) -> None:
    folder = phase.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, power_cut)
        with pytest.raises(KilledError):
            pipeline.serve(folder)
    assert len(list(folder.work_path.iterdir())) == pieces
    assert phase.end(folder) == made
    assert phase.undisturbed(folder)


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ({"inversion.stops": "0.5"}, ALL),
        ({"ensemble.combine": "probs"}, ALL),
        ({"relabel.mode": "none"}, ALL),
        ({"distill.images-per-round": 11}, ALL),
        ({"distill.lr": 2e-3}, (ALL[0] - BATCHES - 1, EPOCHS)),  # it decides the student, but no image
        ({"distill.rounds": 2}, (BATCHES - 1, 2)),
        ({"krum.hostile": 2}, (ALL[0] - BATCHES - 1, EPOCHS - 1)),
    ],
)
def test_only_pieces_of_the_same_settings_are_taken_back(
    phase: Phase, change: dict[str, object], made: tuple[int, int]
) -> None:
    folder = phase.start()
    phase.kill(folder)
    folder.continue_with(Config.from_flat(change, base=folder.config))
    assert phase.end(folder) == made
    assert made == ALL or phase.undisturbed(folder, **change)  # where all is made, nothing earlier can be in it


@pytest.mark.parametrize("other", ["code", "versions", "upload"])
def test_pieces_of_other_code_versions_or_uploads_are_made_afresh(
    phase: Phase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    folder = phase.start()
    phase.kill(folder, after=1)
    if other == "code":
        monkeypatch.setattr(checkpoints, "of_method", lambda _: "f" * 12)
    elif other == "versions":
        monkeypatch.setattr(checkpoints, "versions", lambda: {"torch": "1.0"})
    else:  # in the last bit of one weight of one client
        path = folder.upload_paths()[1]
        upload = load(path)
        weights = dict(upload.weights)
        weights["head.bias"].view(torch.int32)[3] ^= 1
        path.unlink()
        save(replace(upload, weights=weights), path)
    with caplog.at_level(logging.INFO, "fedmitr"):
        assert phase.end(folder) == ALL
    assert "images-0-0.safetensors is of other settings, uploads, code or threads; it is made afresh" in caplog.text


@pytest.mark.parametrize(
    ("name", "made", "damage", "said"),
    [
        ("images-0-1", (6, 2), lambda _: b"", "is corrupt: "),
        ("student", (5, 3), lambda content: content[:-1], "is corrupt: "),
        ("images-0-1", (6, 2), lambda content: content[:-1] + bytes([content[-1] ^ 1]), "was altered after it was"),
        ("student", (5, 3), lambda content: content[:-1] + bytes([content[-1] ^ 1]), "was altered after it was"),
    ],
)
def test_a_damaged_piece_is_made_afresh_and_the_log_says_so(
    phase: Phase, caplog: pytest.LogCaptureFixture, name: str, made: tuple[int, int], damage: Any, said: str
) -> None:
    folder = phase.start()
    phase.kill(folder)
    path = folder.work_path / f"{name}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert phase.end(folder) == made
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"{path} {said}")
    assert warning.endswith("; it is made afresh")
    assert phase.undisturbed(folder)


def test_images_that_depend_on_a_student_are_made_again_by_the_one_of_their_epoch(
    phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of the second epoch is lost after it was distilled: the student of that time is needed again."""
    monkeypatch.setattr(fedmitr, "Rounds", partial(rounds.Rounds, by_student=True))
    folder = phase.start()
    phase.kill(folder, after=2 * (BATCHES + 1))
    (folder.work_path / "images-1-1.safetensors").unlink()
    assert phase.end(folder) == (BATCHES + 1, EPOCHS)
    assert phase.undisturbed(folder)


def test_the_seconds_are_those_of_the_work_that_is_in_the_result(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes one second per look, so that every stage takes one second."""
    looks = count()
    monkeypatch.setattr(pipeline, "glimpse", lambda *_: None)
    monkeypatch.setattr(contract.time, "perf_counter", lambda: float(next(looks)))
    folder = phase.start()
    phase.kill(folder, after=1)
    phase.kill(folder, after=BATCHES + 1)
    phase.end(folder)
    assert folder.read_result()["seconds"] == {
        "screening": 1,
        "inversion": ALL[0],
        "distillation": EPOCHS,
        "evaluation": 1,
    }


def test_a_fusion_has_its_own_work_and_can_be_resumed(phase: Phase) -> None:
    root = phase.start()
    phase.reset(2)
    with pytest.raises(KilledError):
        pipeline.fuse(root, "fedmitr", {"relabel.mode": "none"})
    folder = RunFolder.open(root.path / "fused" / "fedmitr-1")
    assert len(list(folder.work_path.iterdir())) == 2
    assert not root.work_path.exists()
    phase.reset()
    other = pipeline.fuse(root, "fedmitr", {"relabel.mode": "none"})
    assert other.path == root.path / "fused" / "fedmitr-2"
    assert not other.work_path.exists()
    assert phase.batches == ALL[0]
    phase.reset()
    resumed = pipeline.run(Config.from_flat({"resume-from": str(folder.path)}, base=folder.config))
    assert resumed.path == folder.path
    assert phase.batches == ALL[0] - 2
    assert not folder.work_path.exists()
    assert outputs(folder) == outputs(other)


def test_checkpoints_stay_until_the_clients_have_evaluated(
    phase: Phase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(**SHAPE, **{"out-dir": str(tmp_path), "partition.clients": 2, "evaluate.where": "clients"})
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "evaluate_client", power_cut)
        with pytest.raises(KilledError):
            pipeline.run(config, "run")
    folder = RunFolder.open(tmp_path / "run")
    assert folder.finished
    assert folder.work_path.exists()
    before = folder.model_path.read_bytes()
    phase.reset()
    pipeline.run(Config.from_flat({"resume-from": str(folder.path)}, base=config))
    assert (phase.batches, phase.epochs) == (0, 0)
    assert folder.model_path.read_bytes() == before
    assert folder.read_result()["accuracy"]["student"] is not None
    assert not folder.work_path.exists()


def test_a_folder_that_cannot_be_removed_does_not_fail_a_run_that_has_ended(
    phase: Phase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", denied)
    folder = phase.start()
    pipeline.serve(folder)
    assert folder.finished
    assert "cannot remove" in caplog.text
