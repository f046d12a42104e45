"""FedPFT: each client's classes as Gaussians of frozen features; the server draws from them and trains a linear head.

Source: Beitollahi et al. 2024, Parametric Feature Transfer, with one Gaussian per client and class [C]: as many
features are drawn as the client has images of the class, but `MOST` at most; beyond, each counts for as many as it
stands for. So neither memory nor time depends on what a client claims.

Deviations [M]: the Gaussians are those of sums (`upload.extras`), in float64; the paper fits mixtures by EM. The head
is the minimum of the cross-entropy with an L2 penalty, found by L-BFGS; the paper trains it by gradient steps.

Shapes: n features of D numbers, Y classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.errors import ConfigError
from ..common.rng import stream
from ..config import Config
from ..merging.closed_form import frozen_weights, require_statistics, statistics_of
from ..statistics.heads import Head
from ..statistics.moments import Statistics
from .contract import OF_IMAGES, Fused, Job

PENALTY = 1.0  # on half the squared weights, beside the sum of cross-entropies: scikit-learn's C = 1
STEPS = 500  # of L-BFGS at most
MOST = 2000  # features drawn of one client and class

UNREAD = OF_IMAGES


def check(config: Config) -> None:
    """Raise ConfigError where the clients would not tell what the Gaussians need."""
    require_statistics(config)
    if not config.upload.variances:
        raise ConfigError("method = 'fedpft' needs variances by class; set upload.extras = 'variances'")


def fuse(job: Job) -> Fused:
    """Draw features, train a head on them, and put it on the public start."""
    config = job.config
    drawn = [draw(statistics_of(upload), stream(config.seed, "fedpft", upload.client)) for upload in job.uploads]
    features, labels, weights = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    with job.stopwatch.stage("head"):
        head = train_head(features, labels, config.model.num_classes, weights)
    return Fused.of_weights(frozen_weights(config, head), job)


def draw(statistics: Statistics, rng: torch.Generator, most: int = MOST) -> tuple[Tensor, Tensor, Tensor]:
    """Of each class as many features as images, or `most`: (n, D), labels (n,), and what each stands for (n,)."""
    drawn_Y = statistics.counts.clamp_max(most)
    labels = torch.arange(len(statistics.counts)).repeat_interleave(drawn_Y.long())
    weights_N = (statistics.counts / drawn_Y.clamp_min(1))[labels]
    noise_ND = torch.randn(len(labels), statistics.sums.shape[1], generator=rng, dtype=torch.float64)
    return statistics.means[labels] + statistics.variances[labels].sqrt() * noise_ND, labels, weights_N


def train_head(features_ND: Tensor, labels_N: Tensor, num_classes: int, weights_N: Tensor | None = None) -> Head:
    """Multinomial logistic regression, from zero weights; a feature of weight 2 counts as two equal ones."""
    linear = nn.Linear(features_ND.shape[1], num_classes, dtype=torch.float64)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    if weights_N is not None and (weights_N == 1).all():
        weights_N = None  # the same bits as without any

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores_NY = linear(features_ND)
        if weights_N is None:
            fit = F.cross_entropy(scores_NY, labels_N, reduction="sum")
        else:
            fit = F.cross_entropy(scores_NY, labels_N, reduction="none") @ weights_N
        total = fit + PENALTY / 2 * linear.weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return Head(linear.weight.detach(), linear.bias.detach())
