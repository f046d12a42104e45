"""A server phase that was killed goes on behind its last finished piece, and ends in the bytes of one that was not."""

import logging
import os
import shutil
from collections.abc import Callable
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
SHAPE = {
    "inversion.steps": 5,
    "distill.rounds": EPOCHS,
    "distill.images-per-round": 12,
    "distill.epochs-per-round": 2,
    "inversion.batch-size": 5,
}
KINDS: dict[str, dict[str, object]] = {
    "sparse": {},
    "pri4": {"inversion.mode": "pri4", "distill.images-per-round": 48},
    "chosen": {"distill.extrapolate": 0.0},  # a start chosen on the first images
}
OUTPUTS = ("model.safetensors", "pool.safetensors")


Start = Callable[..., RunFolder]
Bytes = Callable[..., list[bytes]]


class KilledError(Exception):
    """Stands for a power cut."""


def power_cut(*_: object) -> None:
    raise KilledError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that has its uploads; read only."""
    where = {"out-dir": str(tmp_path_factory.mktemp("trained")), "partition.clients": 3, "method": "fedavg"}
    return pipeline.run(settings(**SHAPE | where), "run")


@pytest.fixture
def start(trained: RunFolder, tmp_path: Path) -> Start:
    """A run folder with these uploads and nothing else."""

    def make(name: str = "run", **changes: object) -> RunFolder:
        config = Config.from_flat({"method": "fedmitr", "out-dir": str(tmp_path), **changes}, base=trained.config)
        folder = RunFolder.create(config, name)
        shutil.copytree(trained.uploads_path, folder.uploads_path, dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn when all is done, and take longer than the rest."""
    for name in ("save_images", "save_partition"):
        monkeypatch.setattr(pipeline, name, lambda *_: None)


@pytest.fixture(scope="module")
def known() -> dict[str, list[bytes]]:
    return {}


@pytest.fixture
def undisturbed(start: Start, work: "Work", known: dict[str, list[bytes]]) -> Bytes:
    """The bytes of a server phase with these settings that is not killed."""

    def serve(**changes: object) -> list[bytes]:
        if repr(changes) not in known:
            known[repr(changes)] = served(start("whole", **changes))
            work.reset()
        return known[repr(changes)]

    return serve


class Work:
    """What was done, and after how much of it the power goes."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, left: int = 10**6) -> None:
        self.batches, self.epochs, self.left = 0, 0, left

    def spend(self) -> None:
        if not self.left:
            raise KilledError
        self.left -= 1


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Counts inversions and distillations; the one after the last that is `left` is killed in its middle."""
    done = Work()
    invert, distil = fedmitr.invert, rounds.distil

    def spy_invert(*given: Any, on_step: Any, **more: Any) -> Any:
        steps = count(1)

        def step(*values: float) -> None:
            on_step(*values)
            if next(steps) == 3:
                done.spend()

        inverted = invert(*given, on_step=step, **more)
        done.batches += 1
        return inverted

    def spy_distil(*given: Any) -> None:
        *before, on_batch, plain = given
        batches = count(1)

        def batch(*values: Any) -> None:
            on_batch(*values)
            if next(batches) == 2:
                done.spend()

        distil(*before, batch, plain)
        done.epochs += 1

    monkeypatch.setattr(fedmitr, "invert", spy_invert)
    monkeypatch.setattr(rounds, "distil", spy_distil)
    return done


def served(folder: RunFolder) -> list[bytes]:
    """Serve to the end, as a new process would; the bytes of what it wrote."""
    again = RunFolder.open(folder.path)
    pipeline.serve(again)
    assert not again.work_path.exists()
    return [(again.path / name).read_bytes() for name in OUTPUTS]


def killed(folder: RunFolder, work: Work, after: int) -> None:
    """Start, and die in the middle of the piece after so many new ones."""
    work.reset(after)
    with pytest.raises(KilledError):
        pipeline.serve(RunFolder.open(folder.path))
    assert not folder.finished
    work.reset()


def killed_in(owner: object, name: str, folder: RunFolder, work: Work) -> tuple[int, int]:
    """Start, and die when this function is called; how many batches and epochs were done."""
    work.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, power_cut)
        with pytest.raises(KilledError):
            pipeline.serve(folder)
    done = work.batches, work.epochs
    work.reset()
    return done


@pytest.mark.parametrize("after", [0, 2, BATCHES + 3, EPOCHS * (BATCHES + 1) - 1])
def test_so_does_one_that_made_batches_side_by_side(start: Start, undisturbed: Bytes, work: Work, after: int) -> None:
    """How many were done when the power went is chance here; the bytes are not, and are those of one thread."""
    folder = start("killed", threads=2, **{"data.flip": True})
    killed(folder, work, after)
    assert served(folder) == undisturbed(**{"data.flip": True})


def test_a_batch_has_as_many_threads_however_few_are_left(
    start: Start, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of larger models are split by thread: a batch alone must not get those of the others, or its bits differ."""
    asked: list[int] = []
    side_by_side = rounds.side_by_side
    monkeypatch.setattr(rounds, "side_by_side", lambda jobs: [asked.append(jobs), side_by_side(jobs)][1])
    folder = start("killed")
    killed(folder, work, 2)
    served(folder)
    assert asked == [BATCHES] * (EPOCHS + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("after", "batches", "epochs"),
    [
        (0, EPOCHS * BATCHES, EPOCHS),  # in the first batch
        (1, EPOCHS * BATCHES - 1, EPOCHS),  # in the second
        (BATCHES, EPOCHS * BATCHES - BATCHES, EPOCHS),  # in the first distillation
        (BATCHES + 3, EPOCHS * BATCHES - BATCHES - 2, EPOCHS - 1),  # in the last batch of the second epoch
        (EPOCHS * (BATCHES + 1) - 1, 0, 1),  # in the last distillation
    ],
)
def test_a_killed_phase_makes_what_is_missing_and_ends_in_the_same_bytes(
    start: Start, undisturbed: Bytes, work: Work, kind: str, after: int, batches: int, epochs: int
) -> None:
    folder = start("killed", **KINDS[kind])
    killed(folder, work, after)
    made = served(folder)
    assert (work.batches, work.epochs) == (batches, epochs)
    assert made == undisturbed(**KINDS[kind])


def test_a_phase_that_dies_after_every_piece_gets_there(start: Start, undisturbed: Bytes, work: Work) -> None:
    wanted = undisturbed()
    folder = start("killed")
    folder.work_path.write_text("x")
    with pytest.raises(RunError, match=r"cannot make the folder .*work: "):
        pipeline.serve(folder)
    folder.work_path.unlink()
    for _ in range(EPOCHS * (BATCHES + 1) - 1):
        killed(folder, work, after=1)
    assert served(folder) == wanted
    assert (work.batches, work.epochs) == (0, 1)


def test_a_phase_killed_in_its_evaluation_only_evaluates(start: Start, undisturbed: Bytes, work: Work) -> None:
    wanted = undisturbed()
    folder = start("killed")
    assert killed_in(pipeline, "compare", folder, work) == (EPOCHS * BATCHES, EPOCHS)
    assert served(folder) == wanted
    assert (work.batches, work.epochs) == (0, 0)


def test_a_piece_that_is_written_when_the_power_goes_does_not_count(
    start: Start, undisturbed: Bytes, work: Work
) -> None:
    wanted = undisturbed()
    folder = start("killed")
    killed_in(os, "fsync", folder, work)
    assert list(folder.work_path.iterdir()) == []
    assert served(folder) == wanted
    assert work.batches == EPOCHS * BATCHES


def test_the_log_says_what_was_taken_back(start: Start, work: Work, caplog: pytest.LogCaptureFixture) -> None:
    folder = start()
    killed(folder, work, after=BATCHES + 2)
    with caplog.at_level(logging.INFO, "fedmitr"):
        served(folder)
    said = [record.message for record in caplog.records if "earlier start" in record.message]
    assert said == [
        "inversion 1/3: batch 1 is of an earlier start",
        "inversion 1/3: batch 2 is of an earlier start",
        "inversion 1/3: batch 3 is of an earlier start",
        "distillation: 1 of 3 rounds are of an earlier start",
        "inversion 2/3: batch 1 is of an earlier start",
    ]


@pytest.mark.parametrize(
    ("change", "batches", "epochs"),
    [
        ({"inversion.stops": "0.5"}, EPOCHS * BATCHES, EPOCHS),
        ({"ensemble.combine": "probs"}, EPOCHS * BATCHES, EPOCHS),
        ({"relabel.mode": "none"}, EPOCHS * BATCHES, EPOCHS),
        ({"distill.images-per-round": 11}, EPOCHS * BATCHES, EPOCHS),
        ({"distill.lr": 2e-3}, EPOCHS * BATCHES - BATCHES - 1, EPOCHS),  # it decides the student, but no image
        ({"distill.rounds": 2}, 2 * BATCHES - BATCHES - 1, 2),
        ({"krum.hostile": 2}, EPOCHS * BATCHES - BATCHES - 1, EPOCHS - 1),
    ],
)
def test_only_pieces_of_the_same_settings_are_taken_back(
    start: Start, undisturbed: Bytes, work: Work, change: dict[str, object], batches: int, epochs: int
) -> None:
    wanted = undisturbed(**change)
    folder = start("killed")
    killed(folder, work, after=BATCHES + 2)
    folder.continue_with(Config.from_flat(change, base=folder.config))
    assert served(folder) == wanted
    assert (work.batches, work.epochs) == (batches, epochs)


@pytest.mark.parametrize("other", ["code", "versions", "upload"])
def test_pieces_of_other_code_versions_or_uploads_are_made_afresh(
    start: Start, work: Work, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    folder = start()
    killed(folder, work, after=BATCHES + 2)
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
        served(folder)
    assert (work.batches, work.epochs) == (EPOCHS * BATCHES, EPOCHS)
    assert "images-0-0.safetensors is of other settings, uploads, code or threads; it is made afresh" in caplog.text


DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda _: b"", "is corrupt: "),
    (lambda content: content[:100], "is corrupt: "),
    (lambda content: content[:-1], "is corrupt: "),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "was altered after it was written"),
]


@pytest.mark.parametrize(("name", "batches", "epochs"), [("images-0-1", 6, 2), ("student", 5, 3)])
@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_piece_is_made_afresh_and_the_log_says_so(
    start: Start,
    undisturbed: Bytes,
    work: Work,
    caplog: pytest.LogCaptureFixture,
    name: str,
    batches: int,
    epochs: int,
    damage: Callable[[bytes], bytes],
    said: str,
) -> None:
    wanted = undisturbed()
    folder = start("killed")
    killed(folder, work, after=BATCHES + 2)
    path = folder.work_path / f"{name}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert served(folder) == wanted
    assert (work.batches, work.epochs) == (batches, epochs)
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"{path} {said}")
    assert warning.endswith("; it is made afresh")


def test_images_that_depend_on_a_student_are_made_again_by_the_one_of_their_epoch(
    start: Start, undisturbed: Bytes, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of the second epoch is lost after it was distilled: the student of that time is needed again."""
    monkeypatch.setattr(fedmitr, "Rounds", partial(rounds.Rounds, by_student=True))
    wanted = undisturbed()
    folder = start("killed")
    killed(folder, work, after=2 * (BATCHES + 1))
    (folder.work_path / "images-1-1.safetensors").unlink()
    assert served(folder) == wanted
    assert (work.batches, work.epochs) == (BATCHES + 1, EPOCHS)


def test_the_seconds_are_those_of_the_work_that_is_in_the_result(
    start: Start, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes one second per look, so that every stage takes one second."""
    looks = iter(range(10**6))
    monkeypatch.setattr(contract.time, "perf_counter", lambda: float(next(looks)))
    folder = start()
    killed(folder, work, after=1)
    killed(folder, work, after=BATCHES + 1)
    served(folder)
    assert folder.read_result()["seconds"] == {
        "inversion": EPOCHS * BATCHES,
        "distillation": EPOCHS,
        "evaluation": 1,
    }


def test_a_fusion_has_its_own_work_and_can_be_resumed(start: Start, work: Work) -> None:
    root = start()
    work.reset(2)
    with pytest.raises(KilledError):
        pipeline.fuse(root, "fedmitr", {"relabel.mode": "none"})
    folder = RunFolder.open(root.path / "fused" / "fedmitr-1")
    assert len(list(folder.work_path.iterdir())) == 2
    assert not root.work_path.exists()
    work.reset()
    other = pipeline.fuse(root, "fedmitr", {"relabel.mode": "none"})
    assert other.path == root.path / "fused" / "fedmitr-2"
    assert not other.work_path.exists()
    assert work.batches == EPOCHS * BATCHES
    work.reset()
    resumed = pipeline.run(Config.from_flat({"resume-from": str(folder.path)}, base=folder.config))
    assert resumed.path == folder.path
    assert work.batches == EPOCHS * BATCHES - 2
    assert not folder.work_path.exists()
    for name in OUTPUTS:
        assert (folder.path / name).read_bytes() == (other.path / name).read_bytes()


def test_checkpoints_stay_until_the_clients_have_evaluated(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
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
    work.reset()
    pipeline.run(Config.from_flat({"resume-from": str(folder.path)}, base=config))
    assert (work.batches, work.epochs) == (0, 0)
    assert folder.model_path.read_bytes() == before
    assert folder.read_result()["accuracy"]["student"] is not None
    assert not folder.work_path.exists()


def test_a_folder_that_cannot_be_removed_does_not_fail_a_run_that_has_ended(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", denied)
    folder = start()
    pipeline.serve(folder)
    assert folder.finished
    assert "cannot remove" in caplog.text
