"""Settings that a run does not read: what is said of them, and that they change nothing."""

from typing import Any

import pytest
import torch
from tiny import an_upload, fused, same, settings

from fedmitr_flwr import methods, pipeline
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.unread import unread_line

# Another value of every setting that may be unread.
OTHERS: dict[str, object] = {
    "inversion.mode": "dense",
    "inversion.steps": 5,
    "inversion.stops": "0.4",
    "relabel.mode": "none",
    "distill.init": "initial",
    "distill.rounds": 2,
    "distill.images-per-round": 20,
    "distill.epochs-per-round": 2,
    "distill.lr": 0.01,
    "krum.hostile": 0,
    "partition.alpha": 0.7,
    "partition.classes-per-client": 3,
    "evaluate.holdout": 0.2,
    "privacy.delta": 1e-4,
    "privacy.clip": 2.0,
    "flower.node-wait": 5.0,
}


def line(flat: dict[str, object], **more: Any) -> str:
    config = Config.from_flat(flat)
    return unread_line(config, methods.unread(config), **more)


def test_what_is_not_read_is_said_with_the_reason() -> None:
    """Of a fusion, only what was asked for now."""
    cases: list[tuple[dict[str, object], str]] = [
        ({}, ""),
        ({"local.epochs": 3, "seed": 4, "distill.lr": 0.1}, ""),
        ({"partition.scheme": "iid", "partition.alpha": 0.5}, 'partition.alpha = 0.5 (partition.scheme = "iid")'),
        ({"method": "fedavg", "inversion.steps": 7}, "inversion.steps = 7 (method = 'fedavg')"),
        ({"method": "adi", "relabel.mode": "drop"}, "relabel.mode = \"drop\" (method = 'adi')"),
        ({"krum.hostile": 2}, "krum.hostile = 2 (method = 'fedmitr')"),
        ({"krum.hostile": 2, "method": "krum", "feddf.path": "x"}, "feddf.path = \"x\" (method = 'krum')"),
        ({"privacy.clip": 2.0}, "privacy.clip = 2.0 (privacy.epsilon = 0.0)"),
        ({"privacy.clip": 2.0, "privacy.epsilon": 1.0, "local.outliers": 0.0}, ""),
        ({"flower.strategy": "fedavg", "distill.lr": 0.1}, "distill.lr = 0.1 (flower.strategy = 'fedavg')"),
        ({"flower.strategy": "fedavg", "krum.hostile": 2}, "krum.hostile = 2 (flower.strategy = 'fedavg')"),
    ]
    for flat, said in cases:
        assert line(flat) == (f"settings that this run does not read: {said}" if said else "")
    fusion: dict[str, object] = {"method": "fedavg", "inversion.steps": 7, "distill.lr": 0.1}
    assert line(fusion, given=["distill.lr"]).endswith(": distill.lr = 0.1 (method = 'fedavg')")


@pytest.mark.parametrize("method", ["layerwise", "adi", "dense", "krum"])
def test_what_is_said_to_be_unread_changes_no_bit(method: str) -> None:
    """And what is not said does, of the settings of images and student."""
    flat = {"method": method, "ensemble.weights": "estimated", "partition.clients": 4}
    unread = methods.unread(settings(**flat, **OTHERS))
    ignored = {key: value for key, value in OTHERS.items() if key.startswith(tuple(unread))}

    def weights(**changes: object) -> dict[str, torch.Tensor]:
        config = settings(**flat | changes)
        return dict(fused(config, [an_upload(config, client, 10 + client) for client in range(4)]).weights)

    plain, changed = weights(), weights(**ignored)
    assert ignored
    assert same(changed, plain)
    if read := {key: value for key, value in OTHERS.items() if key.startswith("distill.l") and key not in ignored}:
        assert method in ("adi", "dense")
        assert not same(weights(**read), plain)


def test_a_strategy_of_flower_s_does_not_run_without_flower() -> None:
    with pytest.raises(ConfigError, match=r"flower\.strategy = 'fedadam' runs in Flower only"):
        pipeline.run(Config.from_flat({"flower.strategy": "fedadam"}))
