"""Checkpoints: what is kept comes back under the same key, and under no other."""

from dataclasses import replace
from pathlib import Path

import torch
from tiny import an_upload, settings

from fedmitr_flwr.config import Config
from fedmitr_flwr.methods import rounds
from fedmitr_flwr.runs.checkpoints import Checkpoints


def test_pieces_come_back_under_their_own_name_and_method_only(tmp_path: Path) -> None:
    config = settings()
    uploads = [an_upload(config, 0)]
    nowhere = Checkpoints(None, config, uploads, torch.device("cpu"))
    nowhere.save("piece", ("seed",), {"x": torch.ones(1)})
    assert nowhere.load("piece", ("seed",)) is None
    kept = replace(nowhere, folder=tmp_path / "work")
    assert kept.load("piece", ("seed",)) is None
    kept.save("piece", ("seed",), {"x": torch.tensor([1.5])}, words=["a"], number=0.1)
    tensors, facts = kept.load("piece", ("seed",))
    assert tensors["x"].tolist() == [1.5]
    assert facts == {"words": ["a"], "number": 0.1}
    assert kept.load("piece", ("seed", "model.")) is None
    (tmp_path / "work" / "piece.safetensors").rename(tmp_path / "work" / "other.safetensors")
    assert kept.load("other", ("seed",)) is None
    kept.save("piece", ("seed",), {})
    others = [replace(kept, config=settings(**changes)) for changes in ({"method": "fedavg"}, {"seed": 1})]
    others += [replace(kept, device=torch.device("cuda")), replace(kept, threads=kept.threads + 1)]
    assert [other.load("piece", ("seed",)) for other in others] == [None] * 4
    assert replace(kept, config=settings(**{"model.width": 32})).load("piece", ("seed",)) == ({}, {})


def test_every_setting_is_known_to_decide_a_piece_or_not() -> None:
    """A new setting belongs into one of these lists."""
    elsewhere = ("device", "threads", "method")  # in every key already
    no_piece = ("out-dir", "resume-from", "evaluate.", "flower.", "strategy.", "feddf.")
    no_piece += ("krum.", "screen.")  # the uploads themselves are in the key
    in_uploads = ("data.", "partition.", "local.", "upload.", "privacy.")
    for key in Config().to_flat():
        assert key.startswith((*rounds.STUDENT_SETTINGS, *elsewhere, *no_piece, *in_uploads)), key
    assert set(rounds.IMAGE_SETTINGS) < set(rounds.STUDENT_SETTINGS)
