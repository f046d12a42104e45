"""What README.md and docs/benchmark.md say of the benches that are committed.

Each is a folder of benchmarks/results/bench with the results.jsonl and the figures that `fedmitr bench` has written.
"""

import re
from pathlib import Path

from fedmitr_flwr.bench.markup import origin
from fedmitr_flwr.bench.results import load
from fedmitr_flwr.bench.rows import places, rows
from fedmitr_flwr.bench.table import accuracy, markdown, title

NOTHING = "No results are committed yet."
HEADLINE = "cpu"
FROM_ROOT, FROM_DOCS = "benchmarks/results/bench", "../benchmarks/results/bench"


def block(results: Path) -> str:
    """All benches, whole, each with its pictures: docs/benchmark.md."""
    texts = []
    for path in sorted(results.glob("*/results.jsonl")):
        # A bench's own title is a document's: here it stands one level lower.
        text = re.sub(r"^(#+ )", r"#\1", markdown(load(path)).rstrip(), flags=re.MULTILINE)
        drawn = [_picture(picture, FROM_DOCS) for picture in sorted((path.parent / "figures").glob("*.png"))]
        texts.append("\n\n".join([text, *drawn]))
    return "\n\n".join(texts) or NOTHING


def headline(results: Path) -> str:
    """The accuracies of one bench, for its first number of clients, and a picture of them: README.md."""
    path = results / HEADLINE / "results.jsonl"
    if not path.is_file():
        return NOTHING
    bench = load(path)
    found = rows(bench)
    first = places(found)[0]
    own = [row for row in found if row.place[:2] == first[:2]]
    drawn = sorted((path.parent / "figures").glob(f"*-K{first.clients}-bytes.png"))
    parts = [f"### {title(own[0])}", "\n".join(accuracy(own, bench.reference))]
    parts += [_picture(picture, FROM_ROOT) for picture in drawn]
    parts += [f"Command: `fedmitr bench configs/bench/{HEADLINE}.toml`", *dict.fromkeys(map(origin, bench.entries))]
    return "\n\n".join(parts)


def _picture(path: Path, folder: str) -> str:
    bench = path.parents[1].name
    return f"![{bench}: {path.stem.replace('-', ' ')}]({folder}/{bench}/figures/{path.name})"
