"""Finished pieces of a server phase, kept on disk until the run has ended: one that was killed goes on behind them.

A piece is taken back only under the key under which it was kept, a hash of everything that decides its bits: settings,
uploads, code, versions, device and threads. Under any other key it is made afresh.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..common.errors import RunError
from ..common.files import PRIVATE_FOLDER, load_tensors, save_tensors
from ..common.fingerprint import of_method
from ..common.outside import contents, short
from ..common.provenance import versions
from ..config import Config
from ..uploads.upload import Upload, digest

log = logging.getLogger("fedmitr")


@dataclass(frozen=True)
class Checkpoints:
    """The pieces of one run. Without a folder nothing is kept and nothing is found."""

    folder: Path | None
    config: Config
    uploads: Sequence[Upload]
    device: torch.device
    threads: int = field(default_factory=torch.get_num_threads)

    @classmethod
    def of_any_method(
        cls, folder: Path | None, config: Config, uploads: Sequence[Upload], device: torch.device
    ) -> Self:
        """Pieces that come before all methods and are alike for them."""
        return cls(folder, replace(config, method=Config().method), uploads, device)

    def has(self, name: str, settings: tuple[str, ...]) -> bool:
        """Whether `load` would give something."""
        return self.load(name, settings) is not None

    def load(self, name: str, settings: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and facts of a piece, as an earlier start has saved them.

        None: there are none under the same key, or they were altered since. `settings` are beginnings of the keys of
        all settings that decide the piece, such as ("seed", "model.").
        """
        if self.folder is None or not self._path(name).exists():
            return None
        try:
            tensors, header = load_tensors(self._path(name))
        except RunError as error:
            log.warning("%s; it is made afresh", error)
            return None
        if header.get("key") != self._key(name, settings):
            log.info("%s is of other settings, uploads, code or threads; it is made afresh", self._path(name))
            return None
        return tensors, header["facts"]

    def save(self, name: str, settings: tuple[str, ...], tensors: Mapping[str, Tensor], **facts: object) -> None:
        """Keep a piece, whole or not at all, in place of an earlier one of its name. `facts` is what JSON can hold.

        Raises:
            RunError: it cannot be written (disk full, ...).
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        save_tensors(self._path(name), tensors, {"key": self._key(name, settings), "facts": facts})

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _key(self, name: str, settings: tuple[str, ...]) -> str:
        deciding = {key: contents(value) for key, value in self.config.to_flat().items() if key.startswith(settings)}
        content = json.dumps([name, deciding, self._circumstances], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _circumstances(self) -> dict[str, object]:
        """What decides every piece."""
        return {
            "method": short(self.config.method),
            "uploads": [digest(upload) for upload in self.uploads],
            "code": of_method(self.config.method),
            "versions": versions(),
            "device": self.device.type,
            "threads": self.threads,
        }
