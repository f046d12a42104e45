"""The Flower ServerApp: parse the settings once, meet the clients, run one shot or one of Flower's own strategies."""

import logging
from importlib import import_module
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedmitr_flwr import methods, pipeline
from fedmitr_flwr.common.compute import share_memory
from fedmitr_flwr.common.errors import ConfigError, DataError, ModelError, printable
from fedmitr_flwr.common.outside import short
from fedmitr_flwr.common.process import begin, forward
from fedmitr_flwr.common.workers import NONE
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.sections import ONE_SHOT
from fedmitr_flwr.config.text import located
from fedmitr_flwr.flower.checks import prepared
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.runs.result import ending

from . import builtin
from .clients import Clients, meet, with_number_of
from .records import order
from .strategy import OneShot

app = ServerApp()
log = logging.getLogger("fedmitr")
forward("fedmitr", logging.getLogger("flwr"))  # the core's progress appears where Flower's log does


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one experiment."""
    begin(log)
    share_memory()
    try:
        # Whatever may change the current folder from here on, and wherever the clients stand.
        config = prepared(Config.from_flat(located(context.run_config, Path.cwd())))
        if config.flower.strategy == ONE_SHOT:
            one_shot(grid, config, context.run_id)
        else:
            builtin.run(grid, config, context.run_id)
    except (ConfigError, DataError, ModelError) as error:
        log.error("bad input: %s", printable(str(error)))  # by which `fedmitr simulate` knows it from a failure
        raise


def one_shot(grid: Grid, config: Config, run_id: int) -> None:
    """Get the uploads that are missing, then run the server phase."""
    arrays = ArrayRecord(dict(pipeline.start_of(config)))  # first: what cannot be had leaves no folder
    if config.resume_from:  # the uploads must fit the new settings, which the server phase then follows
        number = RunFolder.open(config.resume_from).config.partition.clients
        config = config.with_clients(number)
        methods.check(config, number)
        folder = pipeline.continued(config)
        clients = meet_again(grid, folder)
    else:
        clients = meet(grid, config)
        config = with_number_of(clients, config)
        methods.check(config, clients.number)
        folder = pipeline.created(config, f"{short(config.method)}-{run_id}")
    log.info("run folder: %s", folder.path)
    config = folder.config
    strategy = OneShot(folder, clients.nodes)
    if config.workers != NONE and type(grid).__name__ == "InMemoryGrid":
        import_module("fedmitr_ray.workers").await_simulation()
    with folder.at_work():
        folder.note_start(arrays.to_torch_state_dict())
        strategy.start(grid, arrays, train_config=order(config), evaluate_config=order(config))
    log.info("%s", ending(strategy.result, folder.path))


def meet_again(grid: Grid, folder: RunFolder) -> Clients:
    """Only the clients that are still needed: none, if all have uploaded and the server evaluates."""
    config = folder.config
    number, uploaded = config.partition.clients, folder.upload_paths()
    log.info("%d of %d uploads are in %s", len(uploaded), number, folder.uploads_path)
    if config.evaluate.where == "clients":
        return meet(grid, config, number)
    if not folder.missing():
        return Clients({}, number)
    return meet(grid, config, number, uploaded)
