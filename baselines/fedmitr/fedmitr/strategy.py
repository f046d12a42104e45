"""One round of FedAvg whose aggregation is the server phase of the package."""

from collections.abc import Iterable

from fedmitr_flwr import Result, fuse
from fedmitr_flwr.data.images import Images
from flwr.app import ArrayRecord, Message, MetricRecord, UserConfig
from flwr.serverapp.strategy import FedAvg

from .model import create
from .utils import server_settings


class OneShot(FedAvg):
    """Fuses all uploads by `method`; test images judge the result."""

    def __init__(self, run_config: UserConfig, test: Images) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.run_config = run_config
        self.test = test
        self.fused: Result | None = None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make one network of the clients', without an image of theirs."""
        messages = list(replies)
        arrays, metrics = super().aggregate_train(server_round, messages)
        contents = [message.content for message in messages if message.has_content()]
        if arrays is None:
            return arrays, metrics
        self.fused = fuse(
            [create(self.run_config, content["arrays"]) for content in contents],
            method=str(self.run_config["method"]),
            sizes=[int(content["metrics"]["num-examples"]) for content in contents],
            test=(self.test.pixels, self.test.labels),
            seed=int(self.run_config["seed"]),
            settings=server_settings(self.run_config),
        )
        return ArrayRecord(self.fused.student.state_dict()), metrics
