"""The settings that only some methods read: those on the clients' statistics, and those with real images."""

from dataclasses import dataclass

from .limits import Section


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(Section):
    """Heads from the clients' statistics (`upload.statistics`)."""

    section = "statistics"
    shrinkage: float = 0.0  # lda: share of the covariance that is made even, 0 to 1; 0: by a formula (OAS)
    ridge: float = 1.0  # ridge: the penalty on squared weights
    gaussian: str = "diagonal"  # fedpft: variances by class and coordinate (diagonal) | by class (spherical)

    def __post_init__(self) -> None:
        self._within(0, 1, "shrinkage")
        self._above(0, "ridge")
        self._one_of("gaussian", "diagonal", "spherical")


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
