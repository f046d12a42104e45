"""What a client has revealed of its images under differential privacy, added up over all runs.

A file at the node, one JSON line for each upload that left it. ε and δ of several uploads of the same images add up
(basic composition, the plainest of the valid bounds). An upload that is sent again costs nothing again.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.files import hash_tensors
from fedmitr_flwr.uploads.upload import Upload

NAME = "privacy.jsonl"
_SLACK = 1 + 1e-9  # of floating point


@dataclass(frozen=True)
class Ledger:
    """The uploads of one data set that were noted in a file."""

    path: Path  # of the file; other data sets' uploads may be in it, too
    data: str  # which images, as the operator names them: the folder, whatever is added to it later
    limit: float  # the most that ε may add up to

    def spent(self) -> float:
        """The ε of all uploads so far."""
        return sum(float(entry["epsilon"]) for entry in self._entries())

    def require_room(self, epsilon: float, order: str) -> None:
        """Raise ConfigError where an upload of this ε would exceed the limit, unless this `order` has had one.

        It is known before anybody trains. The upload of an order may be asked for again, if it was lost on its way.
        """
        if not any(entry["order"] == order for entry in self._entries()):
            self._require(epsilon)

    def note(self, upload: Upload, delta: float, order: str) -> None:
        """Write an upload down, on disk before it may leave.

        Raises:
            ConfigError: it is one too much, or cannot be written down.
        """
        assert upload.epsilon is not None
        digest = sha256()
        hash_tensors(digest, upload.weights)
        entry = {"data": self.data, "upload": digest.hexdigest(), "order": order, "epsilon": upload.epsilon}
        entry |= {"delta": delta, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        with self._locked():
            if any(one["upload"] == entry["upload"] for one in self._entries()):
                return
            self._require(upload.epsilon)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _require(self, epsilon: float) -> None:
        spent = self.spent()
        if spent + epsilon > self.limit * _SLACK:
            raise ConfigError(
                f"this node's max-epsilon = {self.limit:g} bounds all uploads of its images together: {spent:g} are "
                f"spent ({NAME} in its work-path) and this run asks for {epsilon:g}; lower privacy.epsilon, or raise "
                "the node's max-epsilon"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The file is ours alone while the block lasts.

        Raises:
            ConfigError: it, or its folder, cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")):
                yield
        except OSError as error:
            raise ConfigError(
                f"this node cannot write down what it spends of max-epsilon ({error.strerror}); set its work-path to a "
                "folder that it may write to"
            ) from error

    def _entries(self) -> list[dict[str, Any]]:
        """Raise ConfigError where the file is damaged: what was spent is not known then."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise self._damaged() from error
        try:
            entries = [json.loads(line) for line in lines]
            return [entry for entry in entries if entry["data"] == self.data and float(entry["epsilon"]) >= 0]
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged() from error

    def _damaged(self) -> ConfigError:
        return ConfigError(
            f"{self.path} is damaged, so that what this node has spent of max-epsilon is not known; mend its last line"
        )
