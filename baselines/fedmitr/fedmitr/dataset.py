"""Fashion-MNIST, dealt out by Flower Datasets."""

from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image
from fedmitr_flwr.data.images import Images
from flwr.app import UserConfig
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import DirichletPartitioner

NAME = "zalando-datasets/fashion_mnist"


def load_client(run_config: UserConfig, partition: int, partitions: int) -> Images:
    """Give one client its training images."""
    federated = _federated(
        str(run_config["data-dir"]),
        int(run_config["train-limit"]),
        partitions,
        float(run_config["alpha"]),
        int(run_config["seed"]),
    )
    return _images(federated.load_partition(partition))


def load_test(run_config: UserConfig) -> Images:
    """Give the server the test images."""
    federated = FederatedDataset(partitioners={}, **_source(run_config["data-dir"]))
    return _images(federated.load_split("test"))


@lru_cache(maxsize=1)
def _federated(
    data_dir: str, limit: int, partitions: int, alpha: float, seed: int
) -> FederatedDataset:
    def limited(splits: DatasetDict) -> DatasetDict:
        train = splits["train"].shuffle(seed=0)
        some = train.select(range(min(limit, len(train))))
        return DatasetDict(train=some, test=splits["test"])

    dirichlet = DirichletPartitioner(
        partitions,
        "label",
        alpha,
        min_partition_size=10,
        self_balancing=False,
        seed=seed,
    )
    return FederatedDataset(
        partitioners={"train": dirichlet}, preprocessor=limited, **_source(data_dir)
    )


def _source(data_dir: object) -> dict[str, object]:
    if not data_dir:
        return {"dataset": NAME}
    files = {split: f"{data_dir}/{split}.parquet" for split in ("train", "test")}
    return {"dataset": "parquet", "data_files": files}


def _images(dataset: Dataset) -> Images:
    rows = dataset.cast_column("image", Image())
    pixels = np.stack([np.asarray(image.convert("L")) for image in rows["image"]])
    return Images(torch.from_numpy(pixels)[:, None], torch.tensor(rows["label"]))
