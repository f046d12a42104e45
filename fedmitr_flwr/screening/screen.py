"""Look at all uploads before an ensemble is formed: say which are strange, and, where wanted, go on without them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import Config
from ..errors import ModelError
from ..training.upload import Upload
from ..vit.build import initial_weights
from .answers import strange_answers
from .findings import Finding
from .weights import strange_weights

log = logging.getLogger("fedmitr")


@dataclass(frozen=True)
class Screened:
    """What screening found.

    Attributes:
        kept: the uploads to go on with, in their order.
        findings: by client.
        excluded: the clients that are left out.
    """

    kept: list[Upload]
    findings: list[Finding]
    excluded: list[int]

    def facts(self, mode: str) -> dict[str, Any]:
        """For result.json."""
        return {"mode": mode, "excluded": self.excluded, "findings": [asdict(each) for each in self.findings]}


def screen(
    uploads: Sequence[Upload], config: Config, device: torch.device, report: Callable[..., None] = lambda **_: None
) -> Screened:
    """Judge the uploads by `config.screen`: one warning for each strange one; with `exclude` they are left out.

    Args:
        uploads: in the clients' order.
        config: of the run.
        device: where synthetic images are made.
        report: called with every finding, for metrics.jsonl.
    """
    mode = config.screen.mode
    if mode == "off":
        return Screened(list(uploads), [], [])
    findings = _findings(uploads, config, device)
    strange = {finding.client for finding in findings}
    excluded = sorted(strange) if mode == "exclude" else []
    if excluded and 2 * len(strange) >= len(uploads):
        log.warning(
            "screening: %d of %d uploads are strange, too many to tell who is right; none is left out",
            *(len(strange), len(uploads)),
        )
        excluded = []
    for finding in findings:
        done = "left out" if excluded else "used all the same; screen.mode = 'exclude' leaves it out"
        log.warning("client %d is strange: %s (%s)", finding.client, finding.text, done)
        report(stage="screen", **asdict(finding), excluded=bool(excluded))
    kept = [upload for upload in uploads if upload.client not in excluded]
    return Screened(kept, findings, excluded)


def _findings(uploads: Sequence[Upload], config: Config, device: torch.device) -> list[Finding]:
    """At most one for each client: weights first, then the answers of those whose weights are like the others'."""
    findings = _first(_by_weights(uploads, config))
    if config.screen.images:
        strange = {finding.client for finding in findings}
        findings += strange_answers([each for each in uploads if each.client not in strange], config, device)
    return sorted(findings, key=lambda finding: finding.client)


def _by_weights(uploads: Sequence[Upload], config: Config) -> list[Finding]:
    try:
        return strange_weights(uploads, initial_weights(config.model, config.seed))
    except ModelError as error:
        if config.screen.mode == "exclude":
            raise
        log.warning("screening: not by weights, for the clients' start cannot be had: %s", error)
        return []


def _first(findings: Sequence[Finding]) -> list[Finding]:
    by_client: dict[int, Finding] = {}
    for finding in findings:
        by_client.setdefault(finding.client, finding)
    return list(by_client.values())
