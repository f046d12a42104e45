"""Look at all uploads before an ensemble is formed: say which are unusual, and leave out what cannot be honest."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..common.errors import ModelError
from ..common.workers import Threads, Workers
from ..config import Config
from ..runs.checkpoints import Checkpoints
from ..statistics import moments
from ..uploads.upload import Upload
from ..vit.build import Weights, initial_weights
from .answers import IMAGES, strange_answers
from .findings import Finding
from .sums import strange_sums
from .weights import FEWEST, OWNS, strange_weights

log = logging.getLogger("fedmitr")

_LEFT_OUT = "left out; if it is honest, fuse the run again with screen.mode = 'warn'"
_USED = "used all the same; screen.mode = 'exclude' leaves it out"
# Settings that decide what is found, given the uploads.
SETTINGS: tuple[str, ...] = ("seed", "data.flip", "model.", "upload.", "screen.", "ensemble.combine")
SETTINGS += ("inversion.batch-size", "inversion.prior")
_MOST = 20  # findings that are told line by line


@dataclass(frozen=True)
class Screened:
    """What screening found."""

    kept: list[Upload]  # to go on with, in their order
    findings: list[Finding]  # by client
    excluded: list[int]  # the clients that are left out
    changed: bool = False  # whether `kept` are other uploads than were given
    earlier: float = 0.0  # seconds that it took, where an earlier fusion of these uploads has done it

    def facts(self, mode: str) -> dict[str, Any]:
        """For result.json."""
        return {"mode": mode, "excluded": self.excluded, "findings": [asdict(each) for each in self.findings]}


def screen(
    uploads: Sequence[Upload],
    config: Config,
    device: torch.device,
    report: Callable[..., None] = lambda **_: None,
    images: int = IMAGES,
    known: Checkpoints | None = None,
    workers: Workers | None = None,
) -> Screened:
    """Judge the uploads by `config.screen`: one warning, and one `report` for metrics.jsonl, for each that is unusual.

    With `clear`, what no honest client can be is left out, and of the others none counts as more than `OWNS` times all
    the rest; with `exclude`, all that is unusual is left out. So many synthetic `images` are made for each class, to
    see whether a client calls the classes by their names; 0: not looked at. What is `known` is taken from there.
    """
    mode = config.screen.mode
    if mode == "off":
        return Screened(list(uploads), [], [])
    kept, earlier, started = known.load("screening", SETTINGS) if known else None, 0.0, time.perf_counter()
    if kept:
        findings, earlier = [Finding(**each) for each in kept[1]["findings"]], kept[1]["seconds"]
    else:
        findings = _findings(uploads, config, device, images, workers or Threads())
        if known:
            found, spent = [asdict(finding) for finding in findings], time.perf_counter() - started
            known.save("screening", SETTINGS, {}, findings=found, seconds=spent)
    leaving = {finding.client for finding in findings if mode == "exclude" or (mode == "clear" and finding.clear)}
    excluded = sorted(leaving)
    if excluded and 2 * len(excluded) >= len(uploads):
        line = "screening: %d of %d uploads would be left out, too many to say who is right; none is left out"
        log.warning(line, len(excluded), len(uploads))
        excluded = []
    for number, finding in enumerate(findings):
        out = finding.client in excluded
        if number < _MOST:
            log.warning("client %d is unusual: %s (%s)", finding.client, finding.text, _LEFT_OUT if out else _USED)
        elif number == _MOST:
            log.warning("and %d more clients; metrics.jsonl says which", len(findings) - _MOST)
        report(stage="screen", **asdict(finding), excluded=out)
    left = [upload for upload in uploads if upload.client not in excluded]
    bounded = left if mode == "warn" else _bounded(left)
    return Screened(bounded, findings, excluded, changed=bool(excluded) or bounded != left, earlier=earlier)


def _findings(
    uploads: Sequence[Upload], config: Config, device: torch.device, images: int, workers: Workers
) -> list[Finding]:
    """At most one for each client: weights and sums first, then the answers of those of which nothing was said."""
    start = _start(config)
    found = [] if start is None else strange_weights(uploads, start)
    if config.upload.statistics:
        found += strange_sums(uploads)
    gravest: dict[int, Finding] = {}
    for finding in sorted(found, key=lambda finding: not finding.clear):
        gravest.setdefault(finding.client, finding)
    findings = list(gravest.values())
    if images:
        others = [each for each in uploads if each.client not in gravest]
        findings += strange_answers(others, config, device, images, workers)
    return sorted(findings, key=lambda finding: finding.client)


def _start(config: Config) -> Weights | None:
    try:
        return initial_weights(config.model, config.seed)
    except ModelError as error:
        if config.screen.mode == "exclude":
            raise
        log.warning("screening: not by weights, for the clients' start cannot be had: %s", error)
        return None


def _bounded(uploads: Sequence[Upload]) -> list[Upload]:
    """A client counts as at most `OWNS` times the images of all others together: a claim is no proof."""
    if len(uploads) < FEWEST:
        return list(uploads)
    total = sum(upload.num_examples for upload in uploads)
    return [_of_at_most(int(OWNS * (total - upload.num_examples)), upload) for upload in uploads]


def _of_at_most(images: int, upload: Upload) -> Upload:
    """The upload, or, where it has more images, as one of fewer, of the same classes to within one image of each."""
    if upload.num_examples <= images:
        return upload
    log.warning("client %d says that it has %d images; it counts as %d", upload.client, upload.num_examples, images)
    if upload.class_counts is None:
        return replace(upload, num_examples=images)
    share = images / upload.num_examples
    counts = tuple(max(1, int(share * count)) if count else 0 for count in upload.class_counts)
    statistics = upload.statistics
    if statistics is not None and "sums" in statistics:
        statistics = {**statistics, **moments.resized(statistics, upload.class_counts, counts)}
    return replace(upload, num_examples=sum(counts), class_counts=counts, statistics=statistics)
