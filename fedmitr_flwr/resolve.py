"""Settings that follow from the data, the model's name and its weights, filled in once, before anything starts."""

from dataclasses import replace

from .common.errors import ConfigError, DataError
from .config import Config, ModelConfig
from .config.recipe import settled
from .config.sections import SMALL
from .data.facts import Facts, facts
from .data.layout import found_source
from .vit.build import require_token_code
from .vit.names import architecture

MOST_PATCHES = 8  # along a side of `small`, where its patch size is left to be found
LEAST_PATCHES = 4  # with fewer, the images' own size is not taken
LARGEST = 64  # pixels along a side of images whose own size `small` takes
SIDE = 32  # of `small`, where the images have no such size
CHANNELS = 3  # of `small`, where no image can be looked at


def resolve(config: Config) -> Config:
    """`config` with nothing left to be found out: what the run folder keeps and the clients are sent.

    The number of classes stays 0 where neither the data nor data.classes says it (`own.named_classes` refuses that).

    Raises:
        ConfigError: a setting contradicts the model's name or the data, or has no effect on it.
        ModelError: the model is none that can be run by patches.
        DataError: the data, of which something is to be found, cannot be read.
    """
    config = replace(config, data=found_source(config.data))
    model = config.model
    if model.name != SMALL:
        model = _of_name(model)
    if not model.resolved:
        model = _of_data(model, facts(config), config.data.path or config.data.source)
    if model.resolved:
        require_token_code(model)
    return settled(replace(config, model=model))


def _of_name(model: ModelConfig) -> ModelConfig:
    """With the named model's own sizes; raise ConfigError where a setting is another."""
    published = architecture(model.name)
    if model.patch_size not in (0, published.patch_size):
        raise ConfigError(
            f"model.patch-size = {model.patch_size}, but model.name = {model.name!r} has patches of "
            f"{published.patch_size} px; leave model.patch-size out, or name another model"
        )
    defaults = ModelConfig()
    for key in ("width", "depth"):
        if getattr(model, key) != getattr(defaults, key):
            raise ConfigError(
                f"model.{key} = {getattr(model, key)} is of model.name = 'small', but model.name = {model.name!r} has "
                f"its own; leave model.{key} out, or name another model"
            )
    return replace(
        model,
        img_size=model.img_size or published.img_size,
        patch_size=published.patch_size,
        in_chans=model.in_chans or published.in_chans,
    )


def _of_data(model: ModelConfig, found: Facts, place: str) -> ModelConfig:
    if found.least == 1 and model.num_classes in (0, found.classes - 1):
        raise DataError(
            f"{place}: labels begin at 1 (1 to {found.classes - 1}), but classes are numbered from 0; "
            "subtract 1 from each"
        )
    more = found.classes > model.num_classes
    if model.num_classes and found.classes and (more or (found.named and model.num_classes != found.classes)):
        raise ConfigError(
            f"model.num-classes = {model.num_classes}, but {place} has {found.classes} classes; "
            "leave model.num-classes out, or give the data of that model"
        )
    if found.classes == 1 and not model.num_classes:
        raise DataError(f"{place}: all images are of one class; put images of another class there, too")
    patch = model.patch_size
    side = model.img_size or _side(found.side, patch)
    return replace(
        model,
        img_size=side,
        patch_size=patch or patch_of(side),
        in_chans=model.in_chans or found.channels or CHANNELS,
        num_classes=model.num_classes or found.classes,
    )


def _side(own: int, patch: int) -> int:
    """The images' own size where `small` can be trained on it, or else 32."""
    if not 0 < own <= LARGEST:
        return SIDE
    fits = own % patch == 0 if patch else own // patch_of(own) >= LEAST_PATCHES
    return own if fits else SIDE


def patch_of(side: int) -> int:
    """The smallest patch of at least 2 px that divides the side into at most 8: 2 for 8 px, 4 for 28 and 32."""
    return next(patch for patch in range(min(2, side), side + 1) if side % patch == 0 and side // patch <= MOST_PATCHES)
