"""The server: one round, then the table and the model."""

from logging import INFO

from flwr.app import ArrayRecord, Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from .dataset import load_test
from .model import create
from .strategy import OneShot

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the round."""
    test = load_test(context.run_config)
    strategy = OneShot(context.run_config, test)
    initial = ArrayRecord(create(context.run_config).state_dict())
    strategy.start(grid, initial, num_rounds=1)
    if strategy.fused is None:
        raise RuntimeError("no client has uploaded a model")
    log(INFO, "\n%s", strategy.fused.table())
    strategy.fused.save_pretrained(str(context.run_config["out-dir"]))
