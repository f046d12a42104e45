"""The clients' common start with a head in closed form on its taps."""

from collections.abc import Sequence

from ..common.errors import ConfigError
from ..config import Config
from ..statistics.heads import Head
from ..statistics.moments import Statistics, total
from ..uploads.upload import Upload
from ..vit.build import Weights, initial_weights
from ..vit.taps import on_taps


def require_statistics(config: Config) -> None:
    """Raise ConfigError where the clients would upload no statistics."""
    if not config.upload.statistics:
        raise ConfigError(
            f"method = {config.method!r} needs the clients' statistics, which tell class counts, too; "
            "set upload.extras = 'statistics'"
        )


def statistics_of(upload: Upload) -> Statistics:
    assert upload.statistics is not None, "upload.extras, which methods check"
    assert upload.class_counts is not None, "they come with the statistics"
    return Statistics.of(upload.statistics, upload.class_counts)


def pooled(uploads: Sequence[Upload]) -> Statistics:
    """The statistics of all clients' images."""
    return total(statistics_of(upload) for upload in uploads)


def frozen_weights(config: Config, head: Head) -> Weights:
    """A head on the features of the weights that all clients started from, as one model (`vit.taps.TapModel`)."""
    return on_taps(initial_weights(config.model, config.seed), head.weight, head.bias)
