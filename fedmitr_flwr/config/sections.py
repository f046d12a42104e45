"""The settings, section by section: each one's type, default and limits."""

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import ConfigError
from .limits import SEPARATOR, Section, check, nearest

REBIRTHS = 4  # v of `pri4`: sparse images that one trajectory gives
ONE_SHOT = "oneshot"  # the strategy that is none of Flower's
OWN = "own"  # the scheme without a partition: every client has its own images
AUTO = "auto"  # of a text setting, as 0 of a number: chosen by what training starts from (recipe.py)
SMALL = "small"  # our own shape of a ViT, by model.width and model.depth
HEAD_WIDTH = 16  # of "small": numbers in one attention head; 4 heads in its 64 (a quarter of DeiT-Tiny's 64)
DIRECTIONS = 32  # of each layer's inputs, in an upload with moments: as good as all of them (docs/LOG.md)
EXTRAS = ("counts", "statistics", "variances", "moments")  # what an upload may contain beside weights
TRACKERS = ("tensorboard", "wandb", "mlflow")  # each the name of the package that it needs
MERGED_HEADS = ("classwise", "wudi")  # starts of the student whose heads wait for images
CONTRAST = "contrast"  # a way to teach that is no rule: what a teacher adds depends on all weights
MERGED = ("average", *MERGED_HEADS)  # starts that are made of the clients' weights


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    section = "data"
    source: str = "auto"  # auto (by what lies at path; digits without one) | digits | parquet | imagefolder | hub
    path: str = ""  # the data's folder, or a data set's name on the Hugging Face Hub
    image_column: str = ""  # "" finds it
    label_column: str = ""  # "" finds it
    train_limit: int = 0  # this many training images, drawn once for all seeds; 0: all
    test_limit: int = 0
    validation: float = 0.0  # choose settings on this share of the training images instead of on the test images
    proxy: float = 0.0  # this share of the training images goes to no client but, without labels, to method feddf
    flip: str = AUTO  # does a mirrored image keep its label? true | false | auto: true with model.weights
    classes: str = ""  # partition.scheme = own: names of the classes, in order, as "cat | dog"; "": the server's data's
    unknown_classes: str = "refuse"  # partition.scheme = own: a client's images of other classes: refuse | skip

    def __post_init__(self) -> None:
        self._one_of("source", "auto", "digits", "parquet", "imagefolder", "hub")
        self._one_of("flip", "true", "false", AUTO)
        self._one_of("unknown_classes", "refuse", "skip")
        self._names("classes")
        self._at_least(0, "train_limit", "test_limit")
        self._within(0, 0.9, "validation", "proxy")
        aside = self.validation + self.proxy
        check("data.proxy", self.proxy, aside <= 0.9, f"less: with data.validation it sets {aside:g} of all aside")
        if self.source not in ("auto", "digits") and not self.path:
            what = "a data set's name" if self.source == "hub" else "a folder"
            raise ConfigError(f"data.path is empty; data.source = {self.source!r} needs {what} there")
        if self.source == "digits" and self.path:
            raise ConfigError(
                f"data.path = {self.path!r} is not read with data.source = 'digits'; leave out one of the two"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._names("classes")

    @property
    def flips(self) -> bool:
        """Whether images are mirrored at random, wherever something is trained on them."""
        assert self.flip != AUTO, "data.flip = 'auto' is to be resolved first"
        return self.flip == "true"


@dataclass(frozen=True, kw_only=True)
class PartitionConfig(Section):
    section = "partition"
    scheme: str = "dirichlet"  # dirichlet | classes-per-client | iid | own (each client's own folder; see deploy/)
    alpha: float = 0.3  # Dirichlet concentration; smaller is more skewed
    classes_per_client: int = 2
    min_size: int = 10  # images that every client gets at least
    clients: int = 5  # without Flower; under Flower it is the number of nodes

    def __post_init__(self) -> None:
        self._one_of("scheme", "dirichlet", "classes-per-client", "iid", OWN)
        self._above(0, "alpha")
        self._at_least(1, "classes_per_client", "min_size")
        self._at_least(2, "clients")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    section = "model"
    name: str = "small"  # small, or any timm vision transformer with a [CLS] token
    img_size: int = 0  # pixels; images are resized to it; 0: timm's for the name; of "small" the images' own
    patch_size: int = 0  # pixels; 0: timm's for the name; of "small" chosen for at most 8 x 8 patches
    in_chans: int = 0  # 1 (grey) | 3 (colour) | 0: timm's for the name; of "small" the images' own
    num_classes: int = 0  # 0: as many as the data has
    width: int = 64  # of "small"
    depth: int = 4  # of "small"
    weights: str = "none"  # none | timm (from the hub) | path of a safetensors file
    kwargs: str = ""  # other arguments of timm, as "reg_tokens=4 | mlp_ratio=2.0"; also mean and std of pixels

    def __post_init__(self) -> None:
        _ = self.arguments
        self._at_least(0, "img_size", "patch_size", "in_chans", "num_classes")
        self._at_least(1, "width", "depth")
        check("model.num-classes", self.num_classes, self.num_classes != 1, "at least 2, or 0 for those of the data")
        whole = not self.patch_size or self.img_size % self.patch_size == 0
        check("model.img-size", self.img_size, whole, f"a multiple of model.patch-size = {self.patch_size}")
        fits = self.width % HEAD_WIDTH == 0
        check("model.width", self.width, fits, f"a multiple of {HEAD_WIDTH}, the width of one attention head")

    @property
    def arguments(self) -> dict[str, object]:
        """Of `kwargs`, by name."""
        found: dict[str, object] = {}
        for word in filter(str.strip, self.kwargs.split(SEPARATOR)):
            name, _, value = map(str.strip, word.partition("="))
            other = {"img_size", "patch_size", "in_chans", "num_classes"}.intersection([name])
            wanted = "name=value, several of them separated by |; sizes and classes are settings of their own"
            try:
                found[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                check("model.kwargs", self.kwargs, False, wanted)
            check("model.kwargs", self.kwargs, name.isidentifier() and not other, wanted)
        return found

    @property
    def resolved(self) -> bool:
        """Whether nothing is left to be found from the name and the data."""
        return 0 not in (self.img_size, self.patch_size, self.in_chans, self.num_classes)

    @property
    def heads(self) -> int:
        """Attention heads in each block of "small"."""
        return self.width // HEAD_WIDTH

    @property
    def grid(self) -> int:
        """Patches along one side; 0 before `resolve`."""
        return self.img_size // self.patch_size if self.patch_size else 0

    @property
    def num_patches(self) -> int:
        return self.grid**2


@dataclass(frozen=True, kw_only=True)
class LocalConfig(Section):
    """Training at the client."""

    section = "local"
    epochs: int = 0  # 0: 50, or 3 with model.weights
    batch_size: int = 32
    optimizer: str = AUTO  # muon (matrices; AdamW for the rest) | adamw | sgd | auto: muon, or adamw with model.weights
    lr: float = 0.0  # 0: 0.003, or 0.0001 with model.weights
    head_lr: float = 0.0  # of the head; 0: as lr, or 0.01 with model.weights, where it alone is new
    augment: bool = True  # shift by up to an eighth of the side, and mirror where data.flip
    outliers: float = 1.0  # times the skew of the client's classes: weight of naming no class on images of none
    threads: int = 1  # fixed, so that a Ray actor and one process give the same bits

    def __post_init__(self) -> None:
        self._one_of("optimizer", "muon", "adamw", "sgd", AUTO)
        self._at_least(1, "batch_size", "threads")
        self._at_least(0, "epochs", "lr", "head_lr", "outliers")

    @property
    def resolved(self) -> bool:
        """Whether nothing is left to be chosen."""
        return 0 not in (self.epochs, self.lr, self.head_lr) and self.optimizer != AUTO


@dataclass(frozen=True, kw_only=True)
class UploadConfig(Section):
    section = "upload"
    dtype: str = "float32"  # float32 | float16
    extras: str = ""  # also upload: counts, statistics, variances, moments; "": weights alone; a privacy choice

    def __post_init__(self) -> None:
        self._one_of("dtype", "float32", "float16")
        for word in self._words:
            if word not in EXTRAS:
                raise ConfigError(
                    f"upload.extras = {self.extras!r} has {word!r}; use {', '.join(EXTRAS)}, separated by commas"
                    f"{nearest(word, EXTRAS)}"
                )

    @property
    def _words(self) -> list[str]:
        words = re.split(r"[,|]", self.extras)  # a list in TOML comes with |
        return [word.strip() for word in words] if self.extras.strip() else []

    @property
    def all_extras(self) -> frozenset[str]:
        """The extras with those that they are of no use without."""
        words = set(self._words)
        words |= {"statistics"} if "variances" in words else set()
        words |= {"counts"} if "statistics" in words else set()
        return frozenset(words)

    @property
    def counts(self) -> bool:
        """Images of each class."""
        return "counts" in self.all_extras

    @property
    def statistics(self) -> bool:
        """Sums over frozen features by class, for `lda` and `ridge`."""
        return "statistics" in self.all_extras

    @property
    def variances(self) -> bool:
        """Sums of squares by class, too, for `fedpft`."""
        return "variances" in self.all_extras

    @property
    def moments(self) -> bool:
        """Second moments of what each layer is given, for `regmean`."""
        return "moments" in self.all_extras

    @property
    def sends_statistics(self) -> bool:
        """Whether tensors are uploaded beside the weights."""
        return self.statistics or self.moments


@dataclass(frozen=True, kw_only=True)
class ScreenConfig(Section):
    """What the server makes of uploads that are well-formed but unusual."""

    section = "screen"
    mode: str = "clear"  # off | warn of unusual uploads | clear: leave out what no honest client can be | exclude: all
    max_images: int = 10_000_000  # an upload that claims more is refused: sizes are weights

    def __post_init__(self) -> None:
        self._one_of("mode", "off", "warn", "clear", "exclude")
        self._at_least(1, "max_images")


@dataclass(frozen=True, kw_only=True)
class KrumConfig(Section):
    section = "krum"
    hostile: int = 1  # clients that method = krum takes to be hostile

    def __post_init__(self) -> None:
        self._at_least(0, "hostile")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Section):
    """Differential privacy at the client, for each single image (DP-SGD); needs opacus."""

    section = "privacy"
    epsilon: float = 0.0  # what an upload may tell of any one image, as a bound ε; 0: no bound and no noise
    delta: float = 1e-5  # with which probability the bound may fail; well below 1 / images
    clip: float = 1.0  # length to which each image's gradient is cut; in place of that of all together

    def __post_init__(self) -> None:
        self._at_least(0, "epsilon")
        self._above(0, "clip")
        self._within(1e-15, 0.1, "delta")


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig(Section):
    """What "the ensemble" is, everywhere: in inversion, importance, relabelling, distillation and evaluation."""

    section = "ensemble"
    combine: str = "probs"  # to decide what an image shows, the mean of the teachers' logits | probs | a Python file
    weights: str = "estimated"  # uniform | size (images per client) | counts (per class too) | estimated

    def __post_init__(self) -> None:
        self._one_of_or_outside("combine", "rules", "logits", "probs")
        self._one_of("weights", "uniform", "size", "counts", "estimated")


@dataclass(frozen=True, kw_only=True)
class InversionConfig(Section):
    section = "inversion"
    mode: str = "sparse"  # dense | sparse (SMI: halt and drop) | pri4 (patch rebirth: four images from one)
    steps: int = 60  # T
    batch_size: int = 125  # images inverted at once
    stops: str = AUTO  # sparse: halting times, as fractions of T; auto: 0.1,0.3, or SMI's four with model.weights
    prior: str = "tv"  # on the images, beside the teachers: tv (total variation) | a Python file
    route: float = 0.0  # ask only teachers with this share of the best one's weight for the target class; 0: all

    def __post_init__(self) -> None:
        self._one_of("mode", "dense", "sparse", "pri4")
        self._one_of_or_outside("prior", "priors", "tv")
        self._within(0, 1, "route")
        self._at_least(1, "steps", "batch_size")
        fractions = () if self.stops == AUTO else self.stop_fractions
        rising = list(fractions) == sorted(set(fractions)) and all(0 < fraction < 1 for fraction in fractions)
        wanted = "rising fractions of the steps between 0 and 1, such as '0.0125,0.025,0.05,0.075'"
        check("inversion.stops", self.stops, rising, wanted)

    @property
    def images_each(self) -> int:
        """Images that one trajectory gives."""
        return REBIRTHS if self.mode == "pri4" else 1

    @property
    def stop_fractions(self) -> tuple[float, ...]:
        assert self.stops != AUTO, "inversion.stops = 'auto' is to be resolved first"
        try:
            return tuple(float(part) for part in self.stops.split(",") if part.strip())
        except ValueError as error:
            raise ConfigError(
                f"inversion.stops = {self.stops!r} is not a list of numbers separated by commas"
            ) from error


@dataclass(frozen=True, kw_only=True)
class RelabelConfig(Section):
    section = "relabel"
    mode: str = "tokens"  # none | drop | tokens

    def __post_init__(self) -> None:
        self._one_of("mode", "none", "drop", "tokens")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section):
    section = "distill"
    rounds: int = 2  # R: each inverts new images, then distils on all images so far
    images_per_round: int = 250
    epochs_per_round: int = 0  # over all images so far; 0: 60, or 5 with model.weights
    init: str = AUTO  # average | classwise (its heads merged by class) | wudi (and its body) | initial | auto
    lr: float = 0.0  # 0: 0.003, or 0.0001 with model.weights

    def __post_init__(self) -> None:
        self._one_of("init", *MERGED, "initial", AUTO)
        self._at_least(1, "rounds", "images_per_round")
        self._at_least(0, "epochs_per_round", "lr")

    @property
    def resolved(self) -> bool:
        """Whether nothing is left to be chosen."""
        return 0 not in (self.epochs_per_round, self.lr) and self.init != AUTO

    @property
    def merges(self) -> bool:
        """Whether the start is made of the clients' weights."""
        return self.init in MERGED

    @property
    def merges_heads(self) -> bool:
        """Whether the start has its head only once there are images."""
        return self.init in MERGED_HEADS

    @property
    def teach(self) -> str:
        """How the ensemble teaches: a student whose head was merged by contrast goes on by it."""
        return CONTRAST if self.merges_heads else "logits"


@dataclass(frozen=True, kw_only=True)
class FedDFConfig(Section):
    """Real images for distillation, which FedMITR does without."""

    section = "feddf"
    path: str = ""  # a folder of images, or with train*.parquet; labels are not used; "": the images of data.proxy


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    section = "evaluate"
    where: str = "server"  # server (its own test images) | clients (each on a held-out part of its own)
    holdout: float = 0.1  # where = clients: the share of its images a client holds out

    def __post_init__(self) -> None:
        self._one_of("where", "server", "clients")
        self._within(0.01, 0.9, "holdout")


@dataclass(frozen=True, kw_only=True)
class FlowerConfig(Section):
    """Settings that only the Flower path reads."""

    section = "flower"
    strategy: str = ONE_SHOT  # oneshot, or a strategy that Flower ships: fedavg, fedadam, ...
    rounds: int = 1  # of a strategy that Flower ships
    options: str = ""  # of that strategy, by Flower's own names, as "eta=0.1, tau=0.01"; "": its defaults
    node_wait: float = 120.0  # seconds to wait for the nodes
    upload_timeout: float = 3600.0  # seconds to wait for the uploads
    quorum: float = 1.0  # share of the clients whose upload must be there
    clients: str = ""  # where nodes have a client-name: all names, as "hospital-a | factory"; the order numbers them

    def __post_init__(self) -> None:
        self._names("clients")
        self._at_least(1, "rounds")
        self._above(0, "node_wait", "upload_timeout")
        self._within(0.01, 1, "quorum")
        self.strategy_options()

    def strategy_options(self) -> dict[str, float]:
        """Numbers by name; which names there are, the strategy says."""
        found: dict[str, float] = {}
        for part in self.options.split(",") if self.options.strip() else ():
            name, _, value = (word.strip() for word in part.partition("="))
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            fits = name.isidentifier() and math.isfinite(number) and name not in found
            check("flower.options", self.options, fits, "different names with numbers, such as 'eta=0.1, tau=0.01'")
            found[name] = number
        return found

    @property
    def client_names(self) -> tuple[str, ...]:
        return self._names("clients")

    def label(self, client: int) -> str:
        """A client's number, and its name where it has one."""
        names = self.client_names
        return f"{client} ({names[client]})" if client < len(names) else str(client)

    def labels(self, clients: Sequence[int]) -> str:
        """Those of several clients; of many, of the first ones."""
        more = [f"and {len(clients) - 20} more"] if len(clients) > 20 else []
        return ", ".join([*map(self.label, clients[:20]), *more])
