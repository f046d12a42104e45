"""The settings that protect: the server from uploads that would spoil the model, and the clients' images."""

from dataclasses import dataclass

from .limits import Section


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
