"""The settings that only some methods and strategies read: with real images, and those that Flower ships."""

from dataclasses import dataclass

from .limits import Section


@dataclass(frozen=True, kw_only=True)
class FedDFConfig(Section):
    """Real images for distillation, which FedMITR does without."""

    section = "feddf"
    path: str = ""  # a folder of images, or with train*.parquet; labels are not used; "": the images of data.proxy
