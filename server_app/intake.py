"""Taking in an upload: read, checked and written to disk, or refused by name and kept apart. No reply gets past it."""

import math
import time
from collections.abc import Callable
from logging import getLogger
from pathlib import Path

from flwr.app import Message

from fedmitr_flwr.compute import return_memory
from fedmitr_flwr.errors import DiskError, RunError, UploadError, UserError
from fedmitr_flwr.fingerprint import fingerprint
from fedmitr_flwr.report.run_folder import RunFolder
from fedmitr_flwr.statistics import moments
from fedmitr_flwr.training.upload import Upload, Weights, validate
from fedmitr_flwr.vit.probe import computes

from .records import keep, read_upload, room

log = getLogger("flwr")

PAUSE, REMIND = 2.0, 60.0  # seconds between two tries to write, and between two complaints that it does not work


class Intake:
    """The way of a reply to the folder of a run."""

    def __init__(self, folder: RunFolder, initial: Weights) -> None:
        """Take uploads of models like `initial`, from which the clients start; only its shape is kept."""
        shapes = {name: tensor.to("meta") for name, tensor in initial.items()}
        self.folder, self.initial, self.limit = folder, shapes, room(shapes)

    def take(self, reply: Message, client: int, node: int) -> None:
        """Write one upload to disk, accepted or refused, and free its memory.

        Args:
            reply: to a train message.
            client: whom the message was sent to.
            node: where it was sent to.
        """
        started = time.monotonic()
        try:
            self._accept(self._checked(reply, client, node))
        except UserError as error:
            tensors, said = keep(reply.content, self.limit)
            name, told = f"client {client}", str(error)
            path = _however_long(name, lambda: self.folder.refuse_upload(name, tensors, told, said))
            log.warning("refused: %s (kept in %s)", error, path)
        for name in list(reply.content):  # no variable holds on to a record
            reply.content[name] = type(reply.content[name])()
        return_memory()
        log.debug("client %d: taken in %.2f s", client, time.monotonic() - started)

    def _checked(self, reply: Message, client: int, node: int) -> Upload:
        config = self.folder.config
        try:
            if (source := reply.metadata.src_node_id) != node:
                raise UploadError(
                    f"client {client}: node {source} answered for node {node}; give every node its own id"
                )
            told = config.upload
            upload = read_upload(reply, client, told.tells_counts, self.limit, with_statistics=told.statistics)
            validate(
                upload,
                self.initial,
                config.model.num_classes,
                fingerprint(),
                config.partition.clients,
                config.screen.max_images,
                statistics=moments.names(told),
            )
            if not computes(upload.weights, config.model):
                raise UploadError(
                    f"client {client}: its model gives NaN or infinity; lower local.lr, and train it again"
                )
        except UserError:
            raise
        except Exception as error:  # what nobody foresaw must not let a reply through, nor cost the others
            log.warning("client %d: its upload made a check fail", client, exc_info=error)
            raise UploadError(
                f"client {client}: its upload cannot be checked ({type(error).__name__}); see the log"
            ) from error
        return upload

    def _accept(self, upload: Upload) -> None:
        path = _however_long(f"client {upload.client}", lambda: self.folder.save_upload(upload))
        told: dict[str, object] = {"client": upload.client, "bytes": upload.num_bytes, "images": upload.num_examples}
        told |= {"loss": upload.train_loss, "seconds": upload.seconds, "epsilon": upload.epsilon}
        try:
            self.folder.log_metrics(stage="upload", **told)
        except RunError as error:  # no reason to refuse what is on disk
            log.error("client %d: its upload is on disk, but not in the metrics: %s", upload.client, error)
        log.info("client %d: %.2f MB on disk, %s", upload.client, upload.num_bytes / 1e6, path.name)


def _however_long(name: str, write: Callable[[], Path]) -> Path:
    """Write until it works: Flower has forgotten the reply, and its client shall not train again."""
    told = -math.inf
    while True:
        try:
            return write()
        except DiskError as error:
            if time.monotonic() - told >= REMIND:
                told = time.monotonic()
                log.error("%s: %s; until then its upload is held in memory, and no other is fetched", name, error)
            time.sleep(PAUSE)
