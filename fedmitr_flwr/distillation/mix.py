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


def mix(patches_BJE: Tensor, positions_BJ: Tensor, how: str, rng: torch.Generator) -> Mixed:
    """Mix each image with a random partner, in a share λ ~ U(0, 1).

    - `blend`: λ x + (1 - λ) x', patch by patch (mixup, Zhang et al. 2018). Where the two images' patches lie at other
      positions, as for halted images, there is nothing to blend: such images are mixed by `tokens`.
    - `tokens`: each token comes from the one or the other image, with its position (MixToken, Jiang et al. 2021).
    """
    batch, tokens = positions_BJ.shape
    device = positions_BJ.device
    kept = all_positions(patches_BJE)
    if how == "none":
        ones = torch.ones(batch, tokens, device=device)
        return Mixed(patches_BJE, positions_BJ, torch.arange(batch, device=device), ones[:, 0], ones, kept)
    partner = torch.randperm(batch, generator=rng).to(device)
    share = torch.rand(batch, 1, generator=rng).to(device)
    others_BJE, places_BJ = patches_BJE[partner], positions_BJ[partner]
    if how == "blend" and torch.equal(positions_BJ, places_BJ):
        blended = torch.lerp(others_BJE, patches_BJE, share[..., None])
        return Mixed(blended, positions_BJ, partner, share[:, 0], share.expand(-1, tokens), kept)
    own = torch.rand(batch, tokens, generator=rng).to(device) < share
    return Mixed(
        torch.where(own[..., None], patches_BJE, others_BJE),
        torch.where(own, positions_BJ, places_BJ),
        partner,
        own.float().mean(1),
        own.float(),
        kept,
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
