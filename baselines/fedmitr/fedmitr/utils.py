"""Settings of the package from the run configuration."""

from fedmitr_flwr.config import Config
from fedmitr_flwr.config.recipe import settled
from flwr.app import UserConfig

CLASSES = 10
SERVER = ("rounds", "images-per-round", "epochs-per-round")


def settings(run_config: UserConfig) -> Config:
    """Of a vision transformer for 28 px in grey, from scratch."""
    return settled(
        Config.from_flat(
            {
                "seed": run_config["seed"],
                "data.flip": "true",
                "model.img-size": 28,
                "model.patch-size": 4,
                "model.in-chans": 1,
                "model.num-classes": CLASSES,
                "local.epochs": run_config["local-epochs"],
                "local.batch-size": run_config["batch-size"],
            }
        )
    )


def server_settings(run_config: UserConfig) -> dict[str, object]:
    """Of inversion and distillation, by the package's keys."""
    return {"data.flip": "true"} | {f"distill.{key}": run_config[key] for key in SERVER}
