"""The Flower ServerApp: parse the settings once, meet the clients, run one shot or one of Flower's own strategies."""

import logging

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedmitr_flwr import methods, pipeline
from fedmitr_flwr.compute import share_memory
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.own import named_classes
from fedmitr_flwr.errors import ConfigError
from fedmitr_flwr.fingerprint import fingerprint
from fedmitr_flwr.report.result import accuracy_table
from fedmitr_flwr.report.run_folder import RunFolder
from fedmitr_flwr.resolve import resolve
from fedmitr_flwr.sections import OWN
from fedmitr_flwr.vit.build import initial_weights

from . import builtin
from .clients import Clients, meet
from .records import order
from .strategy import OneShot

app = ServerApp()
log = logging.getLogger("flwr")
logging.getLogger("fedmitr").parent = log  # the core's progress appears where Flower's log does

ONE_SHOT = "oneshot"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one experiment."""
    share_memory()
    config = resolve(Config.from_flat(context.run_config))
    if config.partition.scheme == OWN:
        config = named_classes(config)
    if config.flower.strategy == ONE_SHOT:
        methods.check(config)  # what cannot work is known before anybody is waited for
        one_shot(grid, config, context.run_id)
    else:
        builtin.check(config)
        builtin.run(grid, config, context.run_id)


def one_shot(grid: Grid, config: Config, run_id: int) -> None:
    """Get the uploads that are missing, then run the server phase."""
    if config.flower.rounds != 1:
        raise ConfigError(
            f"flower.rounds = {config.flower.rounds}, but one shot is one round; "
            "set flower.rounds = 1, or flower.strategy to one of Flower's own"
        )
    if config.resume_from:
        folder = resume(config)
        clients = meet_again(grid, folder)
    else:
        clients = meet(grid, config)
        config = config.with_clients(clients.number)
        methods.check(config, clients.number)
        folder = pipeline.created(config, f"{config.method}-{run_id}")
    log.info("run folder: %s", folder.path)
    config = folder.config
    arrays = ArrayRecord(dict(initial_weights(config.model, config.seed)))
    strategy = OneShot(folder, clients.nodes, arrays.to_torch_state_dict())
    strategy.start(grid, arrays, train_config=order(config), evaluate_config=order(config))
    log.info("\n%s\n\nrun folder: %s", accuracy_table(strategy.result), folder.path)


def resume(config: Config) -> RunFolder:
    """Open the run to continue: its uploads must fit the new settings, which its server phase then follows."""
    number = RunFolder.open(config.resume_from).config.partition.clients
    config = config.with_clients(number)
    methods.check(config, number)
    folder = pipeline.continued(config)
    stale = [upload.client for upload in folder.load_uploads() if upload.fingerprint != fingerprint()]
    if stale:
        log.warning("the uploads of clients %s were made by another version of the code", stale)
    return folder


def meet_again(grid: Grid, folder: RunFolder) -> Clients:
    """Only the clients that are still needed: none, if all have uploaded and the server evaluates."""
    config = folder.config
    number, uploaded = config.partition.clients, folder.upload_paths()
    log.info("%d of %d uploads are in %s", len(uploaded), number, folder.uploads_path)
    if config.evaluate.where == "clients":
        return meet(grid, config, number)
    if not folder.missing(number):
        return Clients({}, number)
    return meet(grid, config, number, uploaded)
