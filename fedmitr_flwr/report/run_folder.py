"""The folder of one run: what is written where, and what can be read back to continue or to fuse again."""

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ..config import Config
from ..errors import DiskError, RunError, unread
from ..files import save_tensors, write_text
from ..limits import needed
from ..training.upload import Upload, load, narrowed, save

log = logging.getLogger("fedmitr")

HOME = Path("~/fedmitr-runs")
_UPLOAD = re.compile(r"client_(\d+)\.safetensors")


class RunFolder:
    """One run on disk. Get one by `create`, `open` or `sub`."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, config: Config, name: str) -> Self:
        """Make `<out-dir>/<name>` with its config.toml.

        Raises:
            RunError: the folder exists already, or cannot be made.
        """
        if name in ("", ".", "..") or Path(name).name != name:
            raise RunError(f"{name!r} is no name for a run folder; use one word without a slash")
        parent = Path(config.out_dir) if config.out_dir else HOME
        folder = cls(parent.expanduser().absolute() / name, config)
        folder._make()
        folder.refused_path.mkdir(parents=True)
        return folder

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """The folder of an earlier run, or of one of its fusions.

        Raises:
            RunError: there is no config.toml.
            ConfigError: it is not a config of this version.
        """
        path = Path(path).expanduser().absolute()
        if not (path / "config.toml").is_file():
            raise RunError(
                f"{path} is not a run folder (no config.toml); name one that `fedmitr run` or Flower printed"
            )
        return cls(path, Config.from_file(path / "config.toml"))

    def sub(self, name: str, config: Config | None = None) -> Self:
        """Make the next free `fused/<name>-<n>/`; its uploads are this run's. Default config: this one's by `name`."""
        parent = self.root / "fused"
        number = 1
        while (parent / f"{name}-{number}").exists():
            number += 1
        fused = config or Config.from_flat({"method": name}, base=self.config)
        folder = type(self)(parent / f"{name}-{number}", fused)
        folder._make()
        return folder

    def begun(self, name: str, config: Config) -> Self:
        """`fused/<name>/`, made now, or left there by a start that was interrupted."""
        folder = type(self)(self.root / "fused" / name, config)
        if folder.path.is_dir():
            folder.continue_with(config)
        else:
            folder._make()
        return folder

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True)
        except FileExistsError as error:
            raise RunError(f"the run folder {self.path} exists; give another name, or move it away") from error
        except OSError as error:
            fix = "set out-dir to a folder that you may write to"
            raise RunError(f"cannot make the run folder {self.path}: {error.strerror}; {fix}") from error
        self.continue_with(self.config)

    def continue_with(self, config: Config) -> None:
        """Make `config` this run's own."""
        self.config = config
        write_text(self.path / "config.toml", config.to_toml())

    @property
    def root(self) -> Path:
        """The run that holds the uploads: this one, or the one that this is a fusion of."""
        above = self.path.parent.parent
        return above if self.path.parent.name == "fused" and (above / "config.toml").is_file() else self.path

    @property
    def uploads_path(self) -> Path:
        return self.root / "uploads"

    @property
    def refused_path(self) -> Path:
        return self.uploads_path / "refused"

    @property
    def pool_path(self) -> Path:
        return self.path / "pool.safetensors"

    @property
    def model_path(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def model_arguments_path(self) -> Path:
        return self.path / "model.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def work_path(self) -> Path:
        """Checkpoints of a server phase that has not ended."""
        return self.path / "work"

    @property
    def images_path(self) -> Path:
        return self.path / "images.png"

    @property
    def partition_path(self) -> Path:
        return self.path / "partition.png"

    @property
    def finished(self) -> bool:
        return self.result_path.exists()

    def save_upload(self, upload: Upload) -> Path:
        path = self.uploads_path / f"client_{upload.client:03}.safetensors"
        if path.exists():
            raise RunError(f"client {upload.client} has uploaded already: {path}; every client uploads once")
        save(upload, path)
        return path

    def refuse_upload(
        self, client_or_node: str, weights: Mapping[str, Tensor], reason: str, said: Mapping[str, str] | None = None
    ) -> Path:
        """Keep an upload that must not be used, the reason and what else it `said` in its header: nothing is lost."""
        self.refused_path.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.-]+", "_", client_or_node).strip("._") or "unknown"
        path, number = self.refused_path / f"{stem}.safetensors", 1
        while path.exists():
            number += 1
            path = self.refused_path / f"{stem}-{number}.safetensors"
        save_tensors(path, weights, {"from": client_or_node, "reason": reason, "said": dict(said or {})})
        return path

    def require_room(self, uploads: int, num_bytes: int) -> None:
        """Raise DiskError if so many uploads of so many bytes do not fit on the disk."""
        free = shutil.disk_usage(self.path).free
        if uploads and free < uploads * num_bytes:
            raise DiskError(
                f"the disk of {self.path} has {free / 1e6:.0f} MB free, and {uploads} uploads take "
                f"{uploads * num_bytes / 1e6:.0f} MB; make room there, or set out-dir to another disk"
            )

    def upload_paths(self) -> dict[int, Path]:
        """By client, in the clients' order."""
        found = {path: _UPLOAD.fullmatch(path.name) for path in self.uploads_path.glob("client_*.safetensors")}
        return dict(sorted((int(match[1]), path) for path, match in found.items() if match))

    def load_uploads(self) -> list[Upload]:
        """In the clients' order, as far as this run's settings ask; weights stay on disk until they are asked for."""
        uploads = []
        for client, path in self.upload_paths().items():
            upload = load(path)
            if upload.client != client:
                raise RunError(f"{path} holds the upload of client {upload.client}; give it back its own name")
            uploads.append(narrowed(upload, self.config.upload))
        return uploads

    def missing(self, clients: int) -> list[int]:
        present = self.upload_paths()
        return [client for client in range(clients) if client not in present]

    def require_uploads(self, quorum: float) -> list[Upload]:
        """The uploads, if at least `quorum` of the clients sent one.

        Raises:
            RunError: there are fewer; the missing clients are named.
        """
        clients = self.config.partition.clients
        missing = self.missing(clients)
        if clients - len(missing) < (wanted := needed(quorum, clients)):
            raise RunError(
                f"{clients - len(missing)} of {clients} uploads are in {self.uploads_path} and {wanted} are needed; "
                f"missing: client{'s' * (len(missing) > 1)} {', '.join(map(self.config.flower.label, missing))}; "
                f"run with resume-from = '{self.root}' to ask only them, or lower flower.quorum"
            )
        return self.load_uploads()

    def log_metrics(self, **values: object) -> None:
        """Append one line to metrics.jsonl."""
        line = json.dumps(plain(values), ensure_ascii=False, allow_nan=False)
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.metrics_path}: {error.strerror}") from error

    def save_model(self, weights: Mapping[str, Tensor], timm_arguments: Mapping[str, object]) -> Path:
        """Write model.safetensors, and beside it the arguments that make timm build the model they fit."""
        write_text(self.model_arguments_path, _json(timm_arguments))
        save_tensors(self.model_path, weights)
        return self.model_path

    def write_result(self, result: Mapping[str, object]) -> Path:
        write_text(self.result_path, _json(result))
        return self.result_path

    def clear_work(self) -> None:
        """Remove the checkpoints of a run that has ended."""
        try:
            shutil.rmtree(self.work_path)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("cannot remove %s: %s; the run has ended and does not need it", self.work_path, error)

    def read_result(self) -> dict[str, Any]:
        """Raise RunError if there is no such folder, the run has not ended or the file is damaged."""
        if not self.path.is_dir():
            raise RunError(f"there is no folder {self.path}; name one that `fedmitr run` or Flower printed")
        if not self.finished:
            raise RunError(f"{self.path} has no result.json: the run has not ended; see its uploads and metrics.jsonl")
        try:
            result: dict[str, Any] = json.loads(self.result_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(unread("result", self.result_path, error)) from error
        return result


def plain(value: Any) -> Any:
    """What JSON can hold: tensors and arrays as lists, tuples as lists, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
