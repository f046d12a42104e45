"""Settings of older versions that this one has no longer, and what holds in place of each.

A run folder with them opens: they are named and ignored. In a user's own file or on the command line they are refused.
"""

from collections.abc import Mapping

from ..common.errors import ConfigError

_NOT_TAKEN_OVER = "what it did is gone"
_PUBLISHED = "it has its published value"

RETIRED: Mapping[str, str] = {
    "statistics.shrinkage": "it follows from the statistics, by a formula (OAS)",
    "statistics.ridge": "it is 1 for all",
    "statistics.gaussian": "variances are by class: 'diagonal'",
    "feddf.limit": "all images are taken",
    "feddf.passes": "it is 20 for all",
    "ensemble.temperature": "it is 3 for all",
    "ensemble.teach": "logits are taught, or, beside statistics, probabilities",
    "ensemble.learn-step": _PUBLISHED,
    "ensemble.learn-decay": _PUBLISHED,
    "ensemble.statistics": "with upload.extras = 'statistics', one more teacher has a head by 'lda'",
    "ensemble.trim": _NOT_TAKEN_OVER,
    "ensemble.teacher-chunk": "it is 16 for all",
    "ensemble.stack": "teachers are one batched network on a GPU only: 'auto'",
    "inversion.lr": "it is 0.1, and of method 'adi' 0.25",
    "inversion.drop": "it is 0.3 for all",
    "inversion.rebirths": "it is 4, as inversion.mode = 'pri4' says",
    "inversion.tv": "it is 1e-4 for all",
    "inversion.roll": "nothing is rolled",
    "inversion.start": "images start from 'leaves', those of method 'adi' from 'noise'",
    "inversion.disagree": _NOT_TAKEN_OVER,
    "inversion.precision": "it is 'float32' for all",
    "inversion.compile": "nothing is compiled",
    "relabel.temperature": "it is 1 for all",
    "distill.batch-size": "it is 64 for all",
    "distill.ridge": "it is 0.1 for all",
    "distill.pretrained": "no start of the student has weights of its own",
    "distill.optimizer": "it is 'muon' for all",
    "distill.weight-decay": "it is 0.05 for all",
    "distill.schedule": "it is 'cosine' for all",
    "distill.soft": "logits are followed by 'mse', probabilities by 'kl': 'auto'",
    "distill.temperature": "it is 2, and of the rivals 4",
    "distill.high": "it is 0.1 for all",
    "distill.token": "it is 0.5 for all",
    "distill.low": "it is 1 for all",
    "distill.kd": "it is 1 for all",
    "distill.mix": "images are mixed by 'tokens', and those of the rivals are not mixed",
    "distill.keep": "it is 0.5, and 1 for the rivals",
    "distill.shift": "nothing is shifted",
    "distill.teachers": "they are asked 'again' on each augmented batch",
    "distill.grad-clip": "it is 1 for all",
    "distill.ema": "the student has the last weights",
    "rival.temperature": _PUBLISHED,
    "rival.steps": _PUBLISHED,
    "rival.lr": _PUBLISHED,
    "rival.latent": _PUBLISHED,
    "rival.width": _PUBLISHED,
    "rival.adversarial": _PUBLISHED,
    "rival.hard": _PUBLISHED,
    "rival.perturb": _PUBLISHED,
    "local.token-loss": "it is 0.5 for all",
    "local.label-smoothing": "labels are not smoothed",
    "local.pull": _NOT_TAKEN_OVER,
    "local.weight-decay": "it is 0.05 for all",
    "local.schedule": "it is 'cosine' for all",
    "local.grad-clip": "it is 1 for all",
    "model.heads": "one head has 16 of model.width",
    "screen.images": "5 are made for each class",
    "flower.min-nodes": "there must be 2 nodes; flower.quorum says how many uploads are needed",
    "evaluate.batch-size": "it is 256 for all",
}


def refuse_retired(key: str) -> None:
    """Raise ConfigError, with what holds now, where there was once such a key."""
    if key in RETIRED:
        raise ConfigError(f"config key {key!r} was retired: {RETIRED[key]}; remove it")
