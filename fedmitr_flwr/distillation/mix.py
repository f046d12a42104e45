"""Two synthetic images in one, at the level of tokens.

Shapes: B images, J given patches, I of them kept, E numbers in a patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..vit.tokens import all_positions, take


class Mixed(NamedTuple):
    patches: Tensor  # (B, J, E)
    positions: Tensor  # (B, J)
    partner: Tensor  # (B,) the row of the second image
    share: Tensor  # (B,) weight of the first image's labels; the partner's is 1 - share
    token_share: Tensor  # (B, J) the same for each token
    kept: Tensor  # (B, J) which of the given patches these are: all, before `thin`


def mix(patches_BJE: Tensor, positions_BJ: Tensor, rng: torch.Generator) -> Mixed:
    """Mix each image with a random partner, in a share λ ~ U(0, 1).

    Each token comes from the one or the other image, with its position (MixToken, Jiang et al. 2021).
    """
    batch, tokens = positions_BJ.shape
    device = positions_BJ.device
    partner = torch.randperm(batch, generator=rng).to(device)
    share = torch.rand(batch, 1, generator=rng).to(device)
    others_BJE, places_BJ = patches_BJE[partner], positions_BJ[partner]
    own = torch.rand(batch, tokens, generator=rng).to(device) < share
    return Mixed(
        torch.where(own[..., None], patches_BJE, others_BJE),
        torch.where(own, positions_BJ, places_BJ),
        partner,
        own.float().mean(1),
        own.float(),
        all_positions(patches_BJE),
    )


def thin(mixed: Mixed, most: int, rng: torch.Generator) -> Mixed:
    """Keep at most `most` random patches of each image; class labels weigh what is kept.

    The same tokens in ever new company: a cheap source of diversity, since teachers and student see fewer tokens.
    """
    batch, tokens = mixed.positions.shape
    if most >= tokens:
        return mixed
    chosen = torch.rand(batch, tokens, generator=rng).topk(most).indices.to(mixed.positions.device)
    token_share = take(mixed.token_share, chosen)
    return Mixed(
        take(mixed.patches, chosen),
        take(mixed.positions, chosen),
        mixed.partner,
        token_share.mean(1),
        token_share,
        take(mixed.kept, chosen),
    )
