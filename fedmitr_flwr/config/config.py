"""The configuration of an experiment: every section of settings, read from text and written to it.

A setting's key is its field's name with hyphens, behind its section's name and a dot: `local.batch-size`.
The table `[tool.flwr.app.config]` of pyproject.toml holds the same keys and defaults (tested).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ..common.errors import ConfigError
from . import sections
from .limits import Section, check
from .sections import OWN, REBIRTHS, TRACKERS
from .text import parse_toml, read_flat, spelled, toml_value, typed


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """One experiment."""

    method: str = "fedmitr"  # a file of fedmitr_flwr/methods
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads of the server phase; 0: OMP_NUM_THREADS, or one per core that this process may use
    workers: str = "0"  # Ray tasks of the server phase at once, each with threads of its own; 0: no Ray | auto
    ray_address: str = ""  # of a Ray cluster, as "auto" or "host:6379"; "": Flower's simulation's, or one of its own
    out_dir: str = ""  # where run folders are made; "": ~/fedmitr-runs
    resume_from: str = ""  # a run folder to continue: missing uploads are asked for, finished work is kept
    track: str = ""  # metrics also go to tensorboard | wandb | mlflow; "": to metrics.jsonl alone
    data: sections.DataConfig = field(default_factory=sections.DataConfig)
    partition: sections.PartitionConfig = field(default_factory=sections.PartitionConfig)
    model: sections.ModelConfig = field(default_factory=sections.ModelConfig)
    local: sections.LocalConfig = field(default_factory=sections.LocalConfig)
    upload: sections.UploadConfig = field(default_factory=sections.UploadConfig)
    privacy: sections.PrivacyConfig = field(default_factory=sections.PrivacyConfig)
    screen: sections.ScreenConfig = field(default_factory=sections.ScreenConfig)
    krum: sections.KrumConfig = field(default_factory=sections.KrumConfig)
    ensemble: sections.EnsembleConfig = field(default_factory=sections.EnsembleConfig)
    inversion: sections.InversionConfig = field(default_factory=sections.InversionConfig)
    relabel: sections.RelabelConfig = field(default_factory=sections.RelabelConfig)
    distill: sections.DistillConfig = field(default_factory=sections.DistillConfig)
    feddf: sections.FedDFConfig = field(default_factory=sections.FedDFConfig)
    evaluate: sections.EvaluateConfig = field(default_factory=sections.EvaluateConfig)
    flower: sections.FlowerConfig = field(default_factory=sections.FlowerConfig)

    def __post_init__(self) -> None:
        self._at_least(0, "seed", "threads")
        self._one_of("track", "", *TRACKERS)
        fits = re.fullmatch("0|[1-9][0-9]{0,5}|auto", self.workers)
        check("workers", self.workers, bool(fits), "0, a number of workers, or auto")
        if self.ensemble.weights == "counts" and not self.upload.counts:
            raise ConfigError(
                "ensemble.weights = 'counts' needs the clients' class counts; set upload.extras = 'counts'"
            )
        if self.inversion.route and self.ensemble.weights not in ("counts", "estimated"):
            raise ConfigError(
                f"inversion.route = {self.inversion.route} needs weights that tell classes apart, not "
                f"ensemble.weights = {self.ensemble.weights!r}; use 'estimated' or 'counts', or set inversion.route = 0"
            )
        if self.data.validation and self.evaluate.where == "clients":
            raise ConfigError(
                f"data.validation = {self.data.validation} is for the server, but evaluate.where = 'clients' holds "
                "images out at the clients; set data.validation = 0, or evaluate.where = 'server'"
            )
        self._check_own()
        self._check_privacy()
        if self.partition.scheme == "classes-per-client" and self.model.num_classes:
            each, most = self.partition.classes_per_client, self.model.num_classes
            check("partition.classes-per-client", each, each <= most, f"at most model.num-classes = {most}")
        patches = self.model.num_patches or REBIRTHS  # 0: not known yet
        if self.inversion.images_each > min(patches, self.inversion.steps):
            raise ConfigError(
                f"inversion.mode = {self.inversion.mode!r} needs {REBIRTHS} patches and steps, not {patches} and "
                f"{self.inversion.steps}; use 'sparse'"
            )

    def _check_own(self) -> None:
        """What only makes sense with images of one data set, or only with each client's own."""
        own, names = self.partition.scheme == OWN, self.data.class_names
        if names and not own:
            raise ConfigError(f"data.classes = {self.data.classes!r} is for partition.scheme = 'own'; leave it empty")
        if names and self.model.num_classes not in (0, len(names)):
            raise ConfigError(
                f"data.classes = {self.data.classes!r} has {len(names)} names, but model.num-classes = "
                f"{self.model.num_classes}; make them equal"
            )
        for name in ("train_limit", "validation", "proxy"):
            key, value = self.data.key(name), getattr(self.data, name)
            if own and value:
                raise ConfigError(f"{key} = {value} is of one data set, but partition.scheme = 'own'; set {key} = 0")

    def _check_privacy(self) -> None:
        """What would tell of the images beside the noise, or spend more than is said."""
        if not self.privacy.epsilon:
            return
        beside: dict[str, str | float] = {
            "upload.extras": self.upload.extras,
            "local.outliers": self.local.outliers,
        }
        for key, value in beside.items():
            if value:
                raise ConfigError(
                    f"{key} = {toml_value(value)} reveals something of the images without noise, but privacy.epsilon = "
                    f"{self.privacy.epsilon}; set {key} = {toml_value(type(value)())}"
                )
        if self.flower.rounds > 1:
            raise ConfigError(
                f"privacy.epsilon = {self.privacy.epsilon} is spent in one round, and flower.rounds = "
                f"{self.flower.rounds} would spend it in each; set flower.rounds = 1"
            )

    @classmethod
    def from_flat(cls, flat: Mapping[str, object], base: Self | None = None) -> Self:
        """Parse `{"local.batch-size": 32, ...}`; keys that are absent keep the value of `base`.

        Raises:
            ConfigError: a key is unknown or its value has the wrong type or an impossible value. The key is named.
        """
        base = base or cls()
        known: dict[str, Any] = base.to_flat()
        for key, value in flat.items():
            key = spelled(key) if spelled(key) in known else key
            known[key] = typed(key, value, known)
        found: dict[str, Any] = {}
        for name, value in vars(base).items():
            if isinstance(value, Section):
                found[name] = replace(value, **{own: known[value.key(own)] for own in vars(value)})
            else:
                found[name] = known[base.key(name)]
        return replace(base, **found)

    @classmethod
    def from_toml(cls, text: str, base: Self | None = None) -> Self:
        """Parse a TOML document; nested tables and dotted keys mean the same."""
        return cls.from_flat(parse_toml(text), base)

    @classmethod
    def from_file(cls, path: Path, base: Self | None = None) -> Self:
        flat = read_flat(path)
        try:
            return cls.from_flat(flat, base)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_flat(self) -> dict[str, bool | int | float | str]:
        """Every setting by its key, in the order in which they are declared."""
        flat: dict[str, bool | int | float | str] = {}
        for name, value in vars(self).items():
            if isinstance(value, Section):
                flat |= {value.key(own): inner for own, inner in vars(value).items()}
            else:
                flat[self.key(name)] = value
        return flat

    def to_toml(self) -> str:
        """The complete configuration; `from_toml` of it is an equal Config."""
        return "".join(f"{key} = {toml_value(value)}\n" for key, value in self.to_flat().items())

    def with_clients(self, clients: int) -> Self:
        return replace(self, partition=replace(self.partition, clients=clients))
