"""Taking in an upload: read, checked and written to disk, or refused by name and kept apart. No reply gets past it."""

import math
import time
from collections.abc import Callable
from logging import getLogger
from pathlib import Path

from flwr.app import Message

from fedmitr_flwr.common.compute import return_memory
from fedmitr_flwr.common.errors import DiskError, RunError, UploadError, UserError
from fedmitr_flwr.common.fingerprint import core
from fedmitr_flwr.config import Config
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.uploads.gate import admit, shapes
from fedmitr_flwr.uploads.upload import Upload, extras_like

from .records import keep, read_upload, room

log = getLogger("flwr")

PAUSE, REMIND = 2.0, 60.0  # seconds between two tries to write, and between two complaints that it does not work
MOST = 10  # times the arrays of a model are kept of a refused upload, no more


def checked(reply: Message, client: int, node: int, config: Config) -> Upload:
    """The upload in a reply to a train message to this client's node, if it may be used.

    Raises:
        UploadError: "client 3: ..." with what is wrong and the fix.
    """
    try:
        if (source := reply.metadata.src_node_id) != node:
            raise UploadError(f"client {client}: node {source} answered for node {node}; give every node its own id")
        return admit(read_upload(reply, client, config), config, fingerprint=core())
    except UserError:
        raise
    except Exception as error:  # an unforeseen error must not let a reply through, nor cost the others
        log.warning("client %d: its upload made a check fail", client, exc_info=error)
        raise UploadError(
            f"client {client}: its upload cannot be checked ({type(error).__name__}); see the log"
        ) from error


def take(reply: Message, client: int, node: int, folder: RunFolder) -> None:
    """Write one upload to disk, accepted or refused, and free its memory. Arguments as of `checked`."""
    started = time.monotonic()
    try:
        _accept(checked(reply, client, node, folder.config), folder)
    except UserError as error:
        _refuse(reply, client, error, folder)
    for name in list(reply.content):  # no variable holds on to a record
        reply.content[name] = type(reply.content[name])()
    return_memory()
    log.debug("client %d: taken in %.2f s", client, time.monotonic() - started)


def _refuse(reply: Message, client: int, error: UserError, folder: RunFolder) -> None:
    """Keep what was sent, if that works at once: a refused reply is not worth waiting for."""
    try:
        start = shapes(folder.config.model)
        like = start | extras_like(start, folder.config.upload)
        kept = keep(reply.content, room(like), MOST * len(like))
        reason = f"{error}; {kept.left_out}" if kept.left_out else str(error)
        path = folder.refuse_upload(f"client {client}", kept.tensors, reason, kept.said)
    except Exception as problem:  # whatever a stranger sent
        log.warning("refused: %s (not kept: %s)", error, problem)
        return
    log.warning("refused: %s (kept in %s)", reason, path)


def _accept(upload: Upload, folder: RunFolder) -> None:
    path = _however_long(f"client {upload.client}", lambda: folder.save_upload(upload))
    metrics: dict[str, object] = {"client": upload.client, "bytes": upload.num_bytes, "images": upload.num_examples}
    metrics |= {"loss": upload.train_loss, "seconds": upload.seconds, "epsilon": upload.epsilon}
    try:
        folder.log_metrics(stage="upload", **metrics)
    except RunError as error:  # no reason to refuse what is on disk
        log.error("client %d: its upload is on disk, but not in the metrics: %s", upload.client, error)
    log.info("client %d: %.2f MB on disk, %s", upload.client, upload.num_bytes / 1e6, path.name)


def _however_long(name: str, write: Callable[[], Path]) -> Path:
    """Write until the disk takes it: Flower has forgotten the reply, and its client shall not train again."""
    last_said = -math.inf
    while True:
        try:
            return write()
        except DiskError as error:
            if time.monotonic() - last_said >= REMIND:
                last_said = time.monotonic()
                log.error("%s: %s; until then its upload is held in memory, and no other is fetched", name, error)
            time.sleep(PAUSE)
