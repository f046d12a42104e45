"""The settings that only some methods read: rivals of FedMITR without data, on statistics, and with real images."""

from dataclasses import dataclass

from .limits import Section


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(Section):
    """Heads from the clients' statistics (`upload.extras`)."""

    section = "statistics"
    shrinkage: float = 0.0  # lda: share of the covariance that is made even, 0 to 1; 0: by a formula (OAS)
    ridge: float = 1.0  # ridge: the penalty on squared weights
    gaussian: str = "diagonal"  # fedpft: variances by class: diagonal | spherical; a client's own covariance: tied

    def __post_init__(self) -> None:
        self._within(0, 1, "shrinkage")
        self._above(0, "ridge")
        self._one_of("gaussian", "diagonal", "spherical", "tied")


@dataclass(frozen=True, kw_only=True)
class FedDFConfig(Section):
    """Real images for distillation, which FedMITR does without."""

    section = "feddf"
    path: str = ""  # a folder of images, or with train*.parquet; labels are not used; "": the images of data.proxy
    limit: int = 0  # this many of them; 0: all
    passes: int = 20  # over them

    def __post_init__(self) -> None:
        self._at_least(0, "limit")
        self._at_least(1, "passes")


@dataclass(frozen=True, kw_only=True)
class RivalConfig(Section):
    """Of adi, dense and coboosting; how many images and passes they have is told by `DistillConfig`, as for FedMITR."""

    section = "rival"
    temperature: float = 4.0  # of their distillation, in place of distill.temperature
    steps: int = 30  # of the generator, for each batch of images (dense, coboosting)
    lr: float = 1e-3  # of the generator
    latent: int = 256  # numbers that the generator makes an image from
    width: int = 64  # channels of the generator before its last layer
    adversarial: float = 1.0  # weight of seeking images on which student and ensemble differ
    hard: float = 1.0  # coboosting: exponent of 1 - p, which weighs an image's cross-entropy; 0: all alike
    perturb: float = 8.0  # coboosting: distillation images are moved by so many of 255 grey levels; 0: not

    def __post_init__(self) -> None:
        self._at_least(1, "steps", "latent", "width")
        self._above(0, "temperature", "lr")
        self._at_least(0, "adversarial", "hard")
        self._within(0, 255, "perturb")
