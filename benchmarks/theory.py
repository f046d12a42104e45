"""Do the paper's claims on stability hold? `fedmitr diagnose` on a run of each seed, and every arm's accuracy.

    python benchmarks/theory.py configs/digits.toml --runs FOLDER --json benchmarks/results/theory/digits.json

The arms are {sparse, dense, pri4} x {none, tokens} on each seed's own uploads. Runs are kept in FOLDER, and what is in
the file is not run again: a study can go on over several sittings. The table of docs/theory.md has, for each claim, the
ratio of what the claim is about to what it is compared with.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from markup import Cell, go_on, provenance, sections, seeds
from scipy.stats import t

from fedmitr_flwr import pipeline
from fedmitr_flwr.bench.markup import spread, table
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.text import read_settings
from fedmitr_flwr.diagnostics.diagnose import diagnose
from fedmitr_flwr.report.words import data_set, skew
from fedmitr_flwr.runs.folder import RunFolder

MODES, LABELS = ("sparse", "dense", "pri4"), ("none", "tokens")
OWN = ("sparse", "tokens")
NOISE, LENGTH, TRACE = "input_noise/{}/{}/share", "student_gradients/end/{}/whole/{}", "head_variance/{}/{}/token"
DISTANCE, APART, GAP = "stability/{}/distance", "stability/{}/losses/test", "gap/{}/gap/loss"


class Claim(NamedTuple):
    """That the first of two values, each a path in diagnostics.json, is smaller than the second."""

    name: str
    less: str
    more: str


def _noise(name: str, less: str, more: str) -> list[Claim]:
    return [Claim(f"{name}, {kind}", NOISE.format(kind, less), NOISE.format(kind, more)) for kind in ("roll", "noise")]


CLAIMS: Mapping[str, Sequence[Claim]] = {
    "Sparse inversion removes the noise of the input gradient": [
        *_noise("share of noise, dense: foreground / background", "dense/alive", "dense/halted"),
        *_noise("share of noise, foreground: sparse / dense", "sparse/alive", "dense/alive"),
    ],
    "and makes the loss smoother (a smaller Lipschitz constant)": [
        Claim(
            f"longest gradient, {labels}: sparse / dense",
            LENGTH.format(f"sparse {labels}", "max"),
            LENGTH.format(f"dense {labels}", "max"),
        )
        for labels in LABELS
    ],
    "Relabelling lowers the gradient's variance": [
        Claim(
            f"trace, {mode}, {at}: tokens / none", TRACE.format(at, f"{mode} tokens"), TRACE.format(at, f"{mode} none")
        )
        for mode, at in product(("sparse", "dense"), ("start", "end"))
    ],
    "Both tighten the bound": [
        Claim(f"{name}: {less} / {more}", what.format(less), what.format(more))
        for name, what in (("distance of twins", DISTANCE), ("their losses apart", APART), ("gap", GAP))
        for less, more in (("sparse none", "dense none"), ("sparse tokens", "sparse none"))
    ],
}


def value(found: Mapping[str, Any], path: str) -> float:
    """What stands at a path in diagnostics.json; of a list, the last."""
    at: Any = found
    for key in path.split("/"):
        at = at[key]
    return float(at[-1] if isinstance(at, list) else at)


def cells(config: Config, chosen: Sequence[int], runs: Path) -> Iterator[Cell]:
    for seed in chosen:
        own = Config.from_flat({"seed": seed, "out-dir": str(runs)}, config)
        yield {"seed": seed}, partial(diagnosed, own)
    for seed, mode, labels in product(chosen, MODES, LABELS):
        own = Config.from_flat({"seed": seed, "out-dir": str(runs)}, config)
        yield {"seed": seed, "arm": f"{mode} {labels}"}, partial(fused, own, mode, labels)


def of_seed(config: Config) -> RunFolder:
    """The seed's run, which may be there already, or half of it."""
    path = Path(config.out_dir) / f"seed-{config.seed}"
    if (path / "result.json").exists():
        return RunFolder.open(path)
    if path.exists():
        return pipeline.run(Config.from_flat({"resume-from": str(path)}, config))
    return pipeline.run(config, path.name)


def diagnosed(config: Config) -> dict[str, Any]:
    found = diagnose(of_seed(config))
    claims = [claim for each in CLAIMS.values() for claim in each]
    return {"pairs": {claim.name: [value(found, claim.less), value(found, claim.more)] for claim in claims}}


def fused(config: Config, mode: str, labels: str) -> dict[str, Any]:
    folder = of_seed(config)
    if (mode, labels) != OWN:
        settings = {"inversion.mode": mode, "relabel.mode": labels}
        folder = pipeline.fuse(folder, "fedmitr", settings, f"{mode}-{labels}")
    accuracy = folder.read_result()["accuracy"]
    return {"student": accuracy["student"], "ensemble": accuracy["ensemble"]}


def block(results: Path) -> str:
    """The Markdown of all files of a folder."""
    return sections(results, section, "theory.py")


def section(content: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Mapping[str, Any]] = content["rows"]
    measured = [row["pairs"] for row in rows if "pairs" in row]
    lines = []
    for about, claims in CLAIMS.items():
        lines.append([f"*{about}*", "", "", ""])
        for claim in claims:
            ratios = [less / more for less, more in (pairs[claim.name] for pairs in measured)]
            lines.append([claim.name, spread(ratios, 2), *verdict(ratios)])
    arms = {mode: [row for row in rows if row.get("arm", "").startswith(mode)] for mode in MODES}
    students = [
        [mode, *(spread(row["student"] for row in same if row["arm"].endswith(labels)) for labels in LABELS)]
        for mode, same in arms.items()
        if same
    ]
    return [
        f"### {content['title']}",
        "",
        f"Seeds {seeds(rows)}. Ratio: mean ± sample standard deviation (n). A claim holds where its 95 % interval "
        "(by logarithms and Student's t) lies below 1, and fails where it lies above.",
        "",
        *table(["Claim: the first is smaller", "Ratio", "95 %", "Verdict"], lines),
        "",
        *table(["Student, % (last epoch)", *(f"relabel.mode = {labels}" for labels in LABELS)], students),
        "",
        *provenance(content),
    ]


def verdict(ratios: Sequence[float]) -> tuple[str, str]:
    """The interval in which the ratio lies with 95 %, and what it says."""
    if len(ratios) < 2 or min(ratios) <= 0:
        return "-", "not decided"
    logs = [math.log(ratio) for ratio in ratios]
    half = t.ppf(0.975, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(mean(logs) - half), math.exp(mean(logs) + half)
    return f"{low:.2f} to {high:.2f}", "holds" if high < 1 else "fails" if low > 1 else "not seen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, required=True, help="folder in which the runs are kept")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    config = Config.from_flat(read_settings(arguments.config, arguments.settings, Config().to_flat()))
    title = f"{data_set(config.to_flat())}, {skew(config.to_flat())}"
    made = cells(config, list(map(int, arguments.seeds.split(","))), arguments.runs / arguments.config.stem)
    go_on(arguments.json, made, title=title)


if __name__ == "__main__":
    main()
