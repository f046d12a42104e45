"""A client's newest upload, kept at the client: what was lost on its way is sent again and not trained again.

The server, or the way to it, may fail after hours of training. A request for the same upload gets the one that
is there: the same under a key over everything that decides its bits. One file per client, replaced by the next upload.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..common.errors import RunError
from ..common.files import hash_tensors, load_tensors
from ..common.fingerprint import core
from ..common.provenance import versions
from ..data.images import Images
from ..vit.build import Weights
from .upload import STATISTICS, Upload, load, save

log = logging.getLogger("fedmitr")


def key_of(facts: Mapping[str, object], initial: Weights, images: Images, device: torch.device) -> str:
    """Name everything that decides an upload; `facts` are settings and whatever else JSON can hold."""
    deciding = {**facts, "code": core(), "versions": versions(), "device": device.type}
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    hash_tensors(digest, {**initial, "images/pixels": images.pixels, "images/labels": images.labels})
    return digest.hexdigest()


def once(path: Path, key: str, train: Callable[[], Upload]) -> Upload:
    """The kept upload of this key; without one, train it and keep it."""
    if upload := recall(path, key):
        log.info("client %d: this upload was made for an earlier start of the run; it is sent again", upload.client)
        return upload
    upload = train()
    keep(path, key, upload)
    return upload


def recall(path: Path, key: str) -> Upload | None:
    """The upload of this key, exactly as it was sent; None: another one is kept, or none."""
    if not path.exists():
        return None
    try:
        upload, (tensors, header) = load(path), load_tensors(path)
    except RunError as error:
        log.warning("%s; the client trains again", error)
        return None
    if header.get("key") != key:
        return None
    statistics = {name.removeprefix(STATISTICS): one for name, one in tensors.items() if name.startswith(STATISTICS)}
    weights = {name: one for name, one in tensors.items() if not name.startswith(STATISTICS)}
    return replace(upload, weights=weights, statistics=None if upload.statistics is None else statistics)


def keep(path: Path, key: str, upload: Upload) -> None:
    """Keep it until the next one; if that does not work, the upload is on its way all the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(upload, path, key=key)
    except (RunError, OSError) as error:
        log.warning("this client's upload cannot be kept, and would be trained again: %s", error)
