"""A client: trains once, and uploads its weights once."""

from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.compute import resolve_device, threads
from fedmitr_flwr.common.rng import stream
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .dataset import load_client
from .model import create
from .utils import settings

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the server's weights on the client's own images."""
    config = settings(context.run_config)
    partition = int(context.node_config["partition-id"])
    images = load_client(
        context.run_config, partition, int(context.node_config["num-partitions"])
    )
    vit = create(context.run_config, message.content["arrays"])
    rng = stream(config.seed, "local", 1, partition)
    with threads(1):
        loss = train_local(vit, images, config, rng, resolve_device("auto"))
    metrics = MetricRecord({"num-examples": len(images), "loss": loss})
    arrays = ArrayRecord(vit.cpu().state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
