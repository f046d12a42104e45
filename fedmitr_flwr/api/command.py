"""`fedmitr merge` and `fedmitr init`: from files of weights, or from a folder of images."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.errors import ConfigError, DiskError, printable
from ..config import Config, ModelConfig
from ..config.described import table
from ..config.text import parse_assignment
from ..data.shares import class_names
from ..resolve import resolve
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
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    settings = dict(parse_assignment(word, Config().to_flat()) for word in words if word not in files)
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
    try:
        result.save_pretrained(out)
    except OSError as error:
        raise DiskError(f"cannot write {out} ({error.strerror}); name another folder with --out") from error
    loading = f"timm.create_model('local-dir:{out}', pretrained=True)"
    return "\n\n".join([*([] if test is None else [result.table()]), f"model: {out}, for {loading}"])


def init(folder: Path, settings: Mapping[str, object], out: Path) -> str:
    """Write the settings of a run on the images of `folder`, with all that it was found to need; gives what to do next.

    Raises:
        UserError: the images cannot be read, a setting does not fit them, or `out` is there already.
    """
    place = str(folder.expanduser().absolute()) if folder.exists() else str(folder)
    config = resolve(Config.from_flat({**settings, "data.path": place}))
    classes = class_names(config)
    usual = Config().to_flat()
    found = {key: value for key, value in config.to_flat().items() if value != usual[key]}
    lines = [
        f"# {len(classes)} classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}",
        "# All other settings have their defaults: `fedmitr config` lists them.",
    ]
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write("\n".join([*map(printable, lines), *table(found)]) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {out} ({error.strerror}); name another file with -o") from error
    return f"{out} is written; look through it, then: fedmitr run -c {shlex.quote(str(out))}"
