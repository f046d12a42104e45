"""`fedmitr bench`: run a grid, then write its tables and figures; or only these."""

import logging
import signal
from collections.abc import Mapping
from pathlib import Path

from ..common.errors import ConfigError
from ..common.files import absolute, write_text
from ..config.presets import BENCHES, named_file
from ..runs.folder import HOME
from .figures import draw
from .flower import runner
from .results import load, save
from .run import run
from .spec import read
from .store import Store
from .table import as_csv, latex, markdown

log = logging.getLogger("fedmitr.bench")


def bench(
    file: Path | None,
    words: Mapping[str, object],
    out: Path | None = None,
    table: Path | None = None,
    *,
    known: Path | None = None,
    any_code: bool = False,
    verbose: bool = False,
) -> int:
    """Run the bench `file`, or write the tables of the folder or results.jsonl `table`; gives the exit status.

    Results go to `out`, by default `bench-<name>` beside the run folders. The options are those of the command line.
    """
    if (file is None) == (table is None):
        raise ConfigError("give a bench file, such as smoke, or --table and a folder; not both")
    if known is not None and file is None:
        raise ConfigError("--known goes with a bench file, some of whose cells it holds; give one, or leave it out")
    if table is not None:
        table = absolute(table, "--table")
        write(table, out or (table if table.is_dir() else table.parent))
        return 0
    assert file is not None
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, signal.default_int_handler)  # Flower's processes are stopped in good order
    logging.getLogger("fedmitr").setLevel(logging.INFO if verbose else logging.WARNING)
    log.setLevel(logging.INFO)
    spec = read(named_file(file, BENCHES), words)
    folder = absolute(out or HOME / f"bench-{spec.name}", "--out")
    log.info("bench folder: %s", folder)
    earlier = load(absolute(known, "--known")) if known else None
    tally = run(spec, Store(folder, any_code), runner(spec.client_gpus), earlier)
    write(folder, folder)
    if tally.failed:
        log.warning("%d of %d cells failed; see %s", tally.failed, tally.total, folder / "failed")
    return int(tally.failed > 0)


def write(results: Path, out: Path) -> None:
    """The tables, the figures and one file of all results, from a bench's folder or such a file."""
    found = load(results)
    out = absolute(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    if out / "results.jsonl" != results:
        save(found, out / "results.jsonl")
    write_text(out / "table.csv", as_csv(found))
    write_text(out / "table.tex", latex(found))
    written = draw(found, out / "figures")
    write_text(out / "table.md", markdown(found))
    counts = len(found.entries), len(found.missing)
    log.info("%d cells, %d missing: %s and %d figures", *counts, out / "table.md", written)
