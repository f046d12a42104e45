"""The studies of docs/security.md: the attacks are what they are called, and the tables say what the files say."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import settings

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # no package: it is where the scripts run

from security import attacks, document

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import initial_weights


@pytest.fixture(scope="module")
def honest() -> tuple[Config, Upload]:
    config = settings()
    return config, pipeline.train_client(config, 1, initial_weights(config.model, config.seed))


def test_attacks_on_the_update(honest: tuple[Config, Upload]) -> None:
    config, upload = honest
    start = initial_weights(config.model, config.seed)
    scaled, reversed_ = (attack(upload, config).weights for attack in (attacks.scaled, attacks.reversed_))
    for name, before in start.items():
        update = upload.weights[name] - before
        torch.testing.assert_close(scaled[name] - before, 100 * update, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(reversed_[name] - before, -update, atol=1e-6, rtol=1e-5)
    drawn = [attacks.random(upload, config).weights["head.weight"] for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], start["head.weight"])


def test_permuted_labels_are_the_only_difference(
    honest: tuple[Config, Upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, upload = honest
    permuted = attacks.permuted(upload, config)
    assert not torch.equal(permuted.weights["head.weight"], upload.weights["head.weight"])
    # With the labels as they were, the same call gives the honest upload.
    draw = torch.randperm
    names_as_they_are = lambda count, **how: torch.arange(10) if count == 10 else draw(count, **how)  # noqa: E731
    monkeypatch.setattr(attacks.torch, "randperm", names_as_they_are)
    same = attacks.permuted(upload, config)
    assert all(torch.equal(same.weights[name], tensor) for name, tensor in upload.weights.items())


FACTS = {
    "command": "python benchmarks/x.py",
    "fingerprint": "0123456789ab",
    "versions": {"python": "3.11.9"},
    "machine": {"device": "cpu", "cpu": "Example CPU", "cores": 2},
    "config": {"privacy.delta": 1e-5},
}


def test_the_hostile_table() -> None:
    cells = [(0, "none", 0, 80.0, []), (1, "none", 0, 82.0, [7])]
    cells += [(0, "scaled", 2, 10.0, [0, 1]), (1, "scaled", 2, 12.0, [1, 4, 5])]
    keys = ("seed", "attack", "hostile", "accuracy", "excluded")
    rows = [dict(zip(keys, cell, strict=True)) for cell in cells]
    rows = [row | {"accuracy": dict.fromkeys(document.DEFENCES, row["accuracy"])} for row in rows]
    text = document._hostile({**FACTS, "rows": rows})
    columns = len(document.DEFENCES)
    assert f"| none {'| 81.0 ± 1.4 (2) ' * columns}| 0 of 0, 1 |" in text
    assert f"| 2 scaled {'| 11.0 ± 1.4 (2) ' * columns}| 3 of 4, 2 |" in text
    assert text[0].startswith("Seeds 0, 1; ")
    assert "Command: `python benchmarks/x.py`" in text


def test_the_privacy_table() -> None:
    cells = [(0, 0.0, 0.0, 80.0), (0, 8.0, 7.98, 30.0), (1, 0.0, 0.0, 80.0), (1, 8.0, 7.99, 32.0)]
    lines = ("local", "fedavg", "ensemble", "student")
    rows = [
        {"seed": seed, "epsilon": epsilon, "spent": spent, "accuracy": dict.fromkeys(lines, value)}
        for seed, epsilon, spent, value in cells
    ]
    text = document._privacy({**FACTS, "rows": rows})
    assert f"| no noise {'| 80.0 ± 0.0 (2) ' * 4}|" in text
    assert f"| 8 (at most 7.99 spent) {'| 31.0 ± 1.4 (2) ' * 4}|" in text
