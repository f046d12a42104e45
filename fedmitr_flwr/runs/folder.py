"""The folder of one run: what is written where, and what can be read back to continue or to fuse again."""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from ..common.errors import ConfigError, DiskError, RunError, unread
from ..common.files import PRIVATE, PRIVATE_FOLDER, absolute, checksum, read_text, save_tensors, sync_folder, write_text
from ..config import Config, recipe
from ..config.earlier import RETIRED, UNSET, gone, upgraded
from ..config.limits import needed
from ..config.sections import DIRECTIONS, HEAD_WIDTH, REBIRTHS, SMALL
from ..config.text import read_flat
from . import track
from .result import sealed, unsealed

if TYPE_CHECKING:  # torch takes seconds to import: it is imported where weights are read or written
    from torch import Tensor

    from ..uploads.upload import Upload

log = logging.getLogger("fedmitr")

HOME = Path("~/fedmitr-runs")
LOCK = ".lock"
_IN_THE_WAY = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UPLOAD = re.compile(r"client_(\d{3,})\.safetensors")

_SEAL = "# checksum of what follows: "  # the first line of config.toml; 0.1.0 wrote none
# sha256 of the sorted keys of a config.toml of 0.1.0, which always had all 138 of them.
_KEYS_OF_0_1_0 = "5ba406e530a66f3bf9beb0a89a797db7f981028ab38b85f9d6f09279a09a3b4e"
_UNSET_IN_0_1_0 = "strategy."  # where 0 left what a strategy has, as UNSET does now


class RunFolder:
    """One run on disk. Get one by `create`, `open` or `sub`.

    Who writes into it holds its lock: `with folder.locked(): ...`, in which one may be inside another. The lock is the
    operating system's and ends with its process, however that ends.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self.pool_path = path / "pool.safetensors"
        self.model_path = path / "model.safetensors"
        self.model_config_path = path / "config.json"
        self.card_path = path / "README.md"
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.images_path = path / "images.png"
        self.partition_path = path / "partition.png"
        self.work_path = path / "work"  # checkpoints of a server phase that has not ended
        self._lock: FileLock | None = None
        self._track: track.Add | None = None

    @classmethod
    def create(cls, config: Config, name: str, *, or_next: bool = False) -> Self:
        """Make `<out-dir>/<name>` with its config.toml; with `or_next`, `<name>-2` and so on where that exists.

        Raises:
            RunError: the folder exists already, or cannot be made.
        """
        if name in ("", ".", "..") or Path(name).name != name:
            raise RunError(f"{name!r} is no name for a run folder; use one word without a slash")
        if not name.isprintable():  # neither are lone surrogates, which stand for undecodable bytes
            raise RunError(f"{name!r} is no name for a run folder; leave out control and undecodable characters")
        parent = absolute(config.out_dir or HOME, "out-dir")
        for number in range(1, 1000 if or_next else 2):
            folder = cls(parent / (f"{name}-{number}" if number > 1 else name), config)
            if folder._make(uploads=True):
                return folder
        raise RunError(f"the run folder {parent / name} exists; give another name, or move it away")

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """The folder of an earlier run, or of one of its fusions.

        Raises:
            RunError: there is no config.toml, or it is not what a run has written.
            ConfigError: it has settings that this version does not know.
        """
        path = absolute(path)
        if not (path / "config.toml").is_file():
            raise RunError(
                f"{path} is not a run folder (no config.toml); name one that `fedmitr run` or Flower printed"
            )
        return cls(path, _read_config(path / "config.toml"))

    def sub(self, name: str, config: Config | None = None) -> Self:
        """Make the next free `fused/<name>-<n>/`; its uploads are this run's. Default config: this one's by `name`."""
        fused = config or Config.from_flat({"method": name}, base=self.config)
        number = 1
        while True:
            folder = type(self)(self.root / "fused" / f"{name}-{number}", fused)
            if not folder.path.exists() and folder._make():
                return folder
            number += 1

    def begun(self, name: str, config: Config) -> Self:
        """`fused/<name>/`, made now, or left there by a start that was interrupted, whose settings it still has."""
        folder = type(self)(self.root / "fused" / name, config)
        folder._make()
        return folder

    def _make(self, *, uploads: bool = False) -> bool:
        """Make the folder with its config.toml at once, for its owner alone; False: it exists, and not empty."""
        track.require(self.config.track)
        parent = self.path.parent
        made = [folder for folder in (parent, *parent.parents) if not os.path.lexists(folder)]
        temporary: Path | None = None
        try:
            if parent.exists() and not parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            parent.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{self.path.name[:40]}.", dir=parent))  # for its owner alone
            for name in ("uploads", "uploads/refused") if uploads else ():  # `parents` would make the first for all
                (temporary / name).mkdir(mode=PRIVATE_FOLDER)
            write_text(temporary / "config.toml", _sealed(self.config))
            temporary.rename(self.path)
            for folder in (parent, *(each.parent for each in made)):
                sync_folder(folder)
        except (OSError, ValueError, DiskError) as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            cause = error.__cause__ if isinstance(error, DiskError) else error
            number = cause.errno if isinstance(cause, OSError) else None
            if number in _IN_THE_WAY and os.path.lexists(self.path):
                return False
            for folder in filter(Path.is_dir, made):  # nothing would accept it
                if not any(folder.iterdir()):
                    folder.rmdir()
            why = os.strerror(number) if number else cause
            fix = "make room there" if number in _FULL else "set out-dir to a folder that you may write to"
            raise RunError(f"cannot make the run folder {self.path}: {why}; {fix}") from error
        return True

    @contextmanager
    def at_work(self) -> Iterator[Self]:
        """Hold the lock, with config.toml as this run's settings have it and its tracker, while the block lasts."""
        config = self.config
        with self.locked():
            self.continue_with(config)
            with track.tracking(config.track, self.path, config.to_flat(), self.metrics_path) as self._track:
                yield self
            self._track = None

    def continue_with(self, config: Config) -> None:
        """Make `config` this run's own."""
        self.config = config
        write_text(self.path / "config.toml", _sealed(config))

    @contextmanager
    def locked(self) -> Iterator[Self]:
        """Hold the folder's lock while the block lasts.

        Raises:
            RunError: another process holds it.
        """
        lock = self._lock = self._lock or FileLock(self.path / LOCK, mode=PRIVATE)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise RunError(
                f"another process is at work in {self.path}; wait for it to end, or stop it, and start again"
            ) from error
        except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
            why = getattr(error, "strerror", None) or error
            raise RunError(f"cannot lock {self.path}: {why}; mend that, or move it to another disk") from error
        try:
            yield self
        finally:
            lock.release()

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
    def start_path(self) -> Path:
        """The checksum of the weights that the clients started from; runs of 0.1.0 have none."""
        return self.uploads_path / ".start.sha256"

    @property
    def finished(self) -> bool:
        return os.path.lexists(self.result_path)

    def note_start(self, weights: Mapping[str, "Tensor"]) -> None:
        """Remember which weights the clients start from, wherever their file may lie later."""
        if not self.start_path.exists():
            self.uploads_path.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
            write_text(self.start_path, checksum(weights, {}) + "\n")

    def is_start(self, weights: Mapping[str, "Tensor"]) -> bool:
        """Whether the clients are known to have started from these."""
        if not self.start_path.is_file():
            return False
        return self.start_path.read_text("utf-8", "replace").strip() == checksum(weights, {})

    def save_upload(self, upload: "Upload") -> Path:
        from ..uploads.upload import save

        path = self.uploads_path / _name_of(upload.client)
        if path.exists():
            raise RunError(f"client {upload.client} has uploaded already: {path}; every client uploads once")
        save(upload, path)
        return path

    def refuse_upload(
        self, client_or_node: str, weights: Mapping[str, "Tensor"], reason: str, said: Mapping[str, str] | None = None
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
        clients = {int(match[1]): path for path, match in found.items() if match}
        return {client: path for client, path in sorted(clients.items()) if path.name == _name_of(client)}

    def load_uploads(self) -> list["Upload"]:
        """In the clients' order, as far as this run's settings ask; weights stay on disk until they are asked for.

        Raises:
            UploadError: one of them does not pass the gate (`gate.admit`); its client is named.
            RunError: one of them cannot be read, or is no upload.
        """
        from ..uploads.gate import admit
        from ..uploads.upload import load, narrowed

        uploads = []
        for client, path in self.upload_paths().items():
            try:
                upload = load(path)
            except RunError as error:
                raise type(error)(f"client {self.config.flower.label(client)}: {error}") from error
            if upload.client != client:
                raise RunError(f"{path} holds the upload of client {upload.client}; give it back its own name")
            uploads.append(admit(narrowed(upload, self.config.upload), self.config))
        return uploads

    def missing(self) -> list[int]:
        """The clients that have not uploaded yet."""
        present = self.upload_paths()
        return [client for client in range(self.config.partition.clients) if client not in present]

    def require_uploads(self) -> list["Upload"]:
        """`load_uploads`, if `require_quorum` is met."""
        self.require_quorum()
        return self.load_uploads()

    def require_quorum(self) -> None:
        """Raise RunError, naming the missing clients, if fewer than `flower.quorum` of them have uploaded."""
        clients, missing = self.config.partition.clients, self.missing()
        if clients - len(missing) < (wanted := needed(self.config.flower.quorum, clients)):
            raise RunError(
                f"{clients - len(missing)} of {clients} uploads are in {self.uploads_path} and {wanted} are needed; "
                f"missing: client{'s' * (len(missing) > 1)} {', '.join(map(self.config.flower.label, missing))}; "
                f"run with resume-from = '{self.root}' to ask only them, or lower flower.quorum"
            )

    def log_metrics(self, **values: object) -> None:
        """Append one line to metrics.jsonl."""
        said = plain(values)
        line = json.dumps(said, ensure_ascii=False, allow_nan=False)
        try:
            with open(self.metrics_path, "a", encoding="utf-8", opener=partial(os.open, mode=PRIVATE)) as file:
                file.write(line + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.metrics_path}: {error.strerror}") from error
        if self._track:
            self._track(said)

    def save_model(self, weights: Mapping[str, "Tensor"], timm_config: Mapping[str, object]) -> None:
        """Write model.safetensors, and beside it the config.json by which timm builds the model they fit.

        Raises:
            RunError: a number is NaN or infinite, which no caller should have let come here (`gate.require_model`).
        """
        from ..uploads.gate import require_finite

        require_finite(weights, "it is not written")
        write_text(self.model_config_path, _json(timm_config))
        save_tensors(self.model_path, weights)

    def write_card(self, text: str) -> None:
        write_text(self.card_path, text)

    def write_result(self, result: Mapping[str, object]) -> None:
        write_text(self.result_path, _json(sealed(plain(result))))
        if self._track:
            self._track({"stage": "accuracy", **plain(result["accuracy"])})

    def clear_work(self) -> None:
        """Remove the checkpoints of a run that has ended."""
        try:
            shutil.rmtree(self.work_path)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("cannot remove %s: %s; the run has ended and does not need it", self.work_path, error)

    def read_result(self) -> dict[str, Any]:
        """Raise RunError if there is no such folder, the run has not ended or the file is no result of a run."""
        if not self.path.is_dir():
            raise RunError(f"there is no folder {self.path}; name one that `fedmitr run` or Flower printed")
        if not self.finished:
            raise RunError(f"{self.path} has no result.json: the run has not ended; see its uploads and metrics.jsonl")
        try:
            return unsealed(json.loads(read_text(self.result_path)))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(unread("result", self.result_path, error)) from error


def _name_of(client: int) -> str:
    return f"client_{client:03}.safetensors"


def _sealed(config: Config) -> str:
    text = config.to_toml()
    return f"{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def _read_config(path: Path) -> Config:
    """The settings in a run folder, of this version or an older one.

    Raises:
        RunError: they are not all there, or were edited.
        ConfigError: one is unknown or impossible here. It is named.
    """
    flat = read_flat(path)
    first, _, rest = path.read_bytes().partition(b"\n")
    if first.startswith(_SEAL.encode()):
        if hashlib.sha256(rest).hexdigest() != first.decode(errors="replace").removeprefix(_SEAL):
            raise RunError(f"{path} was cut or altered after it was written (its checksum differs); {_RESTORE}")
    elif hashlib.sha256("\n".join(sorted(flat)).encode()).hexdigest() != _KEYS_OF_0_1_0:
        raise RunError(f"{path} is not whole: it has {len(flat)} settings and no checksum; {_RESTORE}")
    else:
        flat = {key: UNSET if key.startswith(_UNSET_IN_0_1_0) and not value else value for key, value in flat.items()}
        if flat["data.source"] == "digits" and flat["data.path"]:
            log.warning("%s: 0.1.0 read digits for this run, and nothing of data.path = %r", path, flat["data.path"])
            flat["data.path"] = ""
    heads, width = flat.get("model.heads"), flat.get("model.width")
    if flat.get("model.name") == SMALL and heads is not None and width != HEAD_WIDTH * int(str(heads)):
        raise ConfigError(
            f"{path}: model.heads = {heads} of model.width = {width}, and this version has model.width / {HEAD_WIDTH} "
            "heads; use the version that made this run"
        )
    if (asked := flat.get("upload.directions", 0)) not in (0, DIRECTIONS):
        log.warning("%s: moments in %s directions are left aside, for this version uses %d", path, asked, DIRECTIONS)
    flat = upgraded(flat)
    known = Config().to_flat()
    if retired := [key for key in flat if key in RETIRED and key not in known]:
        log.warning("%s: settings of an older version, ignored: %s", path, ", ".join(retired))
    if choices := gone(flat):
        listed = ", ".join(f"{key} = {flat.pop(key)!r}" for key in choices)
        log.warning("%s: choices of an older version, in whose place are today's defaults: %s", path, listed)
    if unknown := [key for key in flat if key not in known and key not in RETIRED]:
        raise ConfigError(f"{path}: unknown config key {unknown[0]!r}; a newer version made this run, so use that one")
    if flat.get("inversion.mode") == "pri" and flat.get("inversion.rebirths") == REBIRTHS:
        flat["inversion.mode"] = "pri4"
    if absent := [key for key in known if key not in flat and key not in choices]:
        log.warning("%s: settings that it was made without have their defaults: %s", path, ", ".join(absent))
    try:
        config = Config.from_flat({key: value for key, value in flat.items() if key in known})
        return recipe.settled(config) if absent or choices else config
    except ConfigError as error:
        fix = "; an older version made this run, so use that one" if retired else ""
        raise ConfigError(f"{path}: {error}{fix}") from error


_RESTORE = "restore it; settings of a new start are given by key=value or -c"


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
