"""`fedmitr merge`: files of weights that were trained elsewhere become one model."""

from collections.abc import Sequence
from pathlib import Path

from ..common.errors import ConfigError
from ..config import Config, ModelConfig
from ..config.text import parse_assignment
from .fusion import fuse


def merge(
    words: Sequence[str],
    model: str,
    *,
    method: str,
    kwargs: str,
    sizes: str | None,
    start: Path | None,
    test: Path | None,
    out: Path,
) -> str:
    """Fuse the files among `words`, the others being settings; gives the last lines to print.

    Raises:
        UserError: as `fuse`; or `out` is there already.
    """
    files = [word for word in words if "=" not in word]
    settings = dict(parse_assignment(word, Config().to_flat()) for word in words if "=" in word)
    if len(files) < 2:
        raise ConfigError(f"there {'is one file' if files else 'are no files'} of weights; give two or more")
    if out.exists():
        raise ConfigError(f"--out {out} is there already; name a new folder")
    try:
        numbers = None if sizes is None else [int(size) for size in sizes.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sizes {sizes!r} are no whole numbers separated by commas") from error
    given = {"model": model, "kwargs": ModelConfig(kwargs=kwargs).arguments, "sizes": numbers}
    seed, device = settings.pop("seed", 0), settings.pop("device", "auto")
    result = fuse(files, method=method, start=start, test=test, seed=seed, device=device, settings=settings, **given)
    result.save_pretrained(out)
    loading = f"timm.create_model('local-dir:{out}', pretrained=True)"
    return "\n\n".join([*([] if test is None else [result.table()]), f"model: {out}, for {loading}"])
