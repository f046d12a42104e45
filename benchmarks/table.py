"""Rewrite the results in README.md and docs/ from committed files, so that no number is typed by hand.

    python benchmarks/table.py            rewrites the blocks between <!-- results --> and <!-- /results -->, and so on
    python benchmarks/table.py --check    exit status 1 if a block is not what the files say

README.md has what benchmarks/studies.py makes of benchmarks/results/*.json and of one bench; docs/results.md has all
studies, benches (bench/*/results.jsonl) and ablations (ablation/*.json); docs/performance.md has speed/*.json and
routing/*.json; docs/theory.md has theory/*.json; docs/security.md has those of security, inference and privacy.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ablation
import benches
import studies
import theory
from security import document as security
from speed import document, routes

ROOT = Path(__file__).resolve().parents[1]


def renewed(path: Path, blocks: Mapping[str, str]) -> tuple[str, str]:
    """A document's text as it is, and with each block between the two marks of its name."""
    old = new = path.read_text(encoding="utf-8")
    for name, inside in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = new.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{path} has no {begin} with an {end} behind it; put the two lines where tables belong")
        new = f"{before}{begin}\n\n{inside}\n\n{end}{after}"
    return old, new


def blocks(options: argparse.Namespace) -> dict[Path, dict[str, str]]:
    """What belongs into each document, by the name of its block."""
    docs, results = options.docs, options.results
    return {
        options.readme: {"glance": studies.glance(results)},
        docs / "results.md": {
            "studies": studies.block(results),
            "bench": benches.block(results / "bench"),
            "ablation": ablation.block(results / "ablation"),
        },
        docs / "performance.md": {
            "speed": document.block(results / "speed"),
            "routing": routes.block(results / "routing"),
        },
        docs / "theory.md": {"theory": theory.block(results / "theory")},
        docs / "security.md": {
            "hostile": security.hostile(results / "security"),
            "inference": security.inference(results / "inference"),
            "privacy": security.privacy(results / "privacy"),
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 1 where `--check` finds a block out of date; 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a block is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    try:
        texts = {path: renewed(path, made) for path, made in blocks(options).items()}
    except (OSError, ValueError) as error:  # UserError, of a bench's file, is a ValueError
        print(f"table: error: {error}", file=sys.stderr)
        return 2
    stale = {path: new for path, (old, new) in texts.items() if new != old}
    for path, new in stale.items():
        if options.check:
            print(f"{path} is out of date; run: python benchmarks/table.py", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
