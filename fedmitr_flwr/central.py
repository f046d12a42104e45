"""The ceiling of a run: one model trained on the images of all its clients in one place.

It is no method: nothing is uploaded and nothing fused. It has the run's settings of local training, start and
evaluation, and needs one data set that the run dealt out.
"""

import logging

import torch

from .client.train import train_local
from .common.compute import forget_peak, peak_memory, resolve_device, threads
from .common.errors import ConfigError
from .common.rng import stream
from .config.sections import OWN
from .data.images import Images
from .data.shares import client_images, server_images
from .judge import evaluate_on
from .methods.contract import Stopwatch
from .pipeline import start_of
from .publish.hub import save_model, write_result
from .runs import result as report
from .runs.folder import RunFolder
from .uploads.gate import require_loss, require_model
from .vit.build import Weights, build_vit

log = logging.getLogger("fedmitr")

NAME = "central"
_FIX = "lower local.lr"


def train_centrally(run: RunFolder, folder: RunFolder | None = None) -> RunFolder:
    """Train for `local.epochs` on the union of the clients' images; gives its folder, a new one under `fused/`.

    Raises:
        ConfigError: the clients' images are not here, or there are none to judge by.
    """
    config = folder.config if folder else run.config
    if config.partition.scheme == OWN:
        raise ConfigError("partition.scheme = 'own': the clients' images are not here to be trained on")
    if config.evaluate.where != "server":
        raise ConfigError(f"evaluate.where = {config.evaluate.where!r}, but a central model is judged by the server")
    device, stopwatch = resolve_device(config.device), Stopwatch()
    forget_peak(device)
    images = everybodys([client_images(config, client)[0] for client in range(config.partition.clients)])
    server_images(config)
    initial = start_of(config)
    folder = folder or run.sub(NAME)
    with folder.at_work():
        _train(folder, initial, images, device, stopwatch)
    return folder


def _train(folder: RunFolder, initial: Weights, images: Images, device: torch.device, stopwatch: Stopwatch) -> None:
    config = folder.config
    test, classes = server_images(config)
    vit = build_vit(config.model)
    vit.load_state_dict(initial)
    log.info("training on the %d images of %d clients", len(images), config.partition.clients)
    with threads(config.threads):
        with stopwatch.stage("training"):
            loss = train_local(vit, images, config, stream(config.seed, NAME), device)
        with stopwatch.stage("evaluation"):
            found = evaluate_on(vit, test, config, device)
    require_model(vit.state_dict(), config.model, _FIX)
    require_loss(found.loss, _FIX)
    folder.log_metrics(stage="training", images=len(images), loss=loss)
    save_model(folder, vit.state_dict(), classes)
    write_result(
        folder,
        report.build(
            config=folder.config,
            device=str(device),
            bytes_up=[],
            seconds=stopwatch.seconds,
            server_seconds=stopwatch.seconds["training"],
            peak_memory=peak_memory(device),
            student=found.accuracy,
            per_class=dict(zip(classes, found.per_class, strict=True)),
            confusion=found.confusion,
            calibration=found.calibration,
            evaluated_on=report.on_server(config.data, len(test)),
        ),
        central=True,
    )


def everybodys(shares: list[Images]) -> Images:
    """The union, client by client."""
    return Images(torch.cat([share.pixels for share in shares]), torch.cat([share.labels for share in shares]))
