"""Taking in an upload: read, checked and written to disk, or refused by name and kept apart. No reply gets past it."""

import math
import time
from collections.abc import Callable
from logging import getLogger
from pathlib import Path

from flwr.app import Message

from fedmitr_flwr.compute import return_memory
from fedmitr_flwr.config import Config
from fedmitr_flwr.errors import DiskError, RunError, UploadError, UserError
from fedmitr_flwr.fingerprint import fingerprint
from fedmitr_flwr.report.run_folder import RunFolder
from fedmitr_flwr.training.upload import Upload, Weights, validate
from fedmitr_flwr.vit.probe import computes

from .records import keep, read_upload, room

log = getLogger("flwr")

PAUSE, REMIND = 2.0, 60.0  # seconds between two tries to write, and between two complaints that it does not work
MOST = 10  # times the arrays of a model are kept of a refused upload, no more


def shapes_of(initial: Weights) -> Weights:
    """The weights without their numbers, except the last LayerNorm's: these say what statistics can be."""
    return {name: tensor if name.startswith("norm.") else tensor.to("meta") for name, tensor in initial.items()}


def checked(reply: Message, client: int, node: int, config: Config, initial: Weights) -> Upload:
    """The upload in a reply, if it may be used.

    Args:
        reply: to a train message.
        client: whom the message was sent to.
        node: where it was sent to.
        config: of the run.
        initial: what the client started from; its shapes are enough.

    Raises:
        UploadError: "client 3: ..." with what is wrong and the fix.
    """
    told = config.upload
    try:
        if (source := reply.metadata.src_node_id) != node:
            raise UploadError(f"client {client}: node {source} answered for node {node}; give every node its own id")
        upload = read_upload(reply, client, told.tells_counts, room(initial), with_statistics=told.sends_statistics)
        validate(
            upload,
            initial,
            config.model.num_classes,
            fingerprint(),
            config.partition.clients,
            config.screen.max_images,
            asked=told,
        )
        if not computes(upload.weights, config.model):
            raise UploadError(f"client {client}: its model gives NaN or infinity; lower local.lr, and train it again")
    except UserError:
        raise
    except Exception as error:  # what nobody foresaw must not let a reply through, nor cost the others
        log.warning("client %d: its upload made a check fail", client, exc_info=error)
        raise UploadError(
            f"client {client}: its upload cannot be checked ({type(error).__name__}); see the log"
        ) from error
    return upload


class Intake:
    """The way of a reply to the folder of a run."""

    def __init__(self, folder: RunFolder, initial: Weights) -> None:
        """Take uploads of models like `initial`, from which the clients start; only its shape is kept."""
        self.folder, self.initial = folder, shapes_of(initial)

    def take(self, reply: Message, client: int, node: int) -> None:
        """Write one upload to disk, accepted or refused, and free its memory.

        Args:
            reply: to a train message.
            client: whom the message was sent to.
            node: where it was sent to.
        """
        started = time.monotonic()
        try:
            self._accept(checked(reply, client, node, self.folder.config, self.initial))
        except UserError as error:
            self._refuse(reply, client, error)
        for name in list(reply.content):  # no variable holds on to a record
            reply.content[name] = type(reply.content[name])()
        return_memory()
        log.debug("client %d: taken in %.2f s", client, time.monotonic() - started)

    def _refuse(self, reply: Message, client: int, error: UserError) -> None:
        """Keep what was sent, if that works at once: nobody waits for what nobody may use."""
        try:
            kept = keep(reply.content, room(self.initial), MOST * len(self.initial))
            told = f"{error}; {kept.left_out}" if kept.left_out else str(error)
            path = self.folder.refuse_upload(f"client {client}", kept.tensors, told, kept.said)
        except Exception as problem:  # whatever a stranger sent
            log.warning("refused: %s (not kept: %s)", error, problem)
            return
        log.warning("refused: %s (kept in %s)", told, path)

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
    """Write until the disk takes it: Flower has forgotten the reply, and its client shall not train again."""
    told = -math.inf
    while True:
        try:
            return write()
        except DiskError as error:
            if time.monotonic() - told >= REMIND:
                told = time.monotonic()
                log.error("%s: %s; until then its upload is held in memory, and no other is fetched", name, error)
            time.sleep(PAUSE)
