"""K frozen networks, no more of them in memory than there is room for.

Shapes: K teachers, B images, M given patches.
"""

from collections.abc import Mapping, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import ModelConfig
from ..uploads.upload import Upload
from ..vit.build import build_vit, vit_of
from ..vit.tokens import Question, ask_with

ROOM = 400 * 2**20  # bytes of networks in memory at once: 18 DeiT-Tiny, or 500 small ViTs
FEW = 16  # networks whose graphs are in memory at once, however large they are
GRAPHS = 2**30  # bytes of the graphs of more of them, in one thread
_KEPT = 9.5  # numbers for each token and each of a block's channels, as counted by torch's hooks on saved tensors


class Teachers(nn.Module):
    """The first ones stay in memory; the others are read from their uploads, one at a time, when their turn comes."""

    def __init__(self, residents: Sequence[VisionTransformer], streamed: Sequence[Mapping[str, Tensor]] = ()) -> None:
        super().__init__()
        self.residents = nn.ModuleList(residents).requires_grad_(False).eval()
        self.streamed = streamed
        self._stack: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    @classmethod
    def of(cls, uploads: Sequence[Upload], model: ModelConfig) -> "Teachers":
        """Networks of `ROOM` in memory: where more are wanted, the last one's place is for guests."""
        guest = build_vit(model)
        at_once = max(1, ROOM // sum(tensor.nbytes for tensor in guest.state_dict().values()))
        resident = len(uploads) if len(uploads) <= at_once else at_once - 1
        networks = [vit_of(model, upload.weights) for upload in uploads[:resident]]
        streamed = [upload.weights for upload in uploads[resident:]]
        return cls([*networks, guest] if streamed else networks, streamed)

    def __len__(self) -> int:
        return len(self.residents) + len(self.streamed) - bool(self.streamed)

    def __getitem__(self, k: int) -> VisionTransformer:
        """The k-th teacher. A streamed one is valid until the next one is asked for."""
        own = len(self) - len(self.streamed)
        if k < own:
            return self.residents[k]
        guest: VisionTransformer = self.residents[-1]
        for name, tensor in guest.state_dict().items():  # not load_state_dict, which would read all of them first
            tensor.copy_(self.streamed[k - own][name])
        return guest

    def keep_graphs(self, patches_BME: Tensor) -> bool:
        """Whether all of them at once may keep what a gradient by these patches needs."""
        batch, given, _ = patches_BME.shape
        vit: VisionTransformer = self.residents[0]
        tokens = batch * (given + vit.num_prefix_tokens)
        kept = 4 * _KEPT * tokens * vit.embed_dim * len(vit.blocks)
        return not self.streamed and (len(self) <= FEW or len(self) * kept <= GRAPHS)

    def ask_stacked(self, question: Question, patches_BME: Tensor, positions_BM: Tensor) -> tuple[Tensor, ...]:
        """All teachers in one call, answers with a first axis K: fewer, larger kernels."""
        if self._stack is None:
            self._stack = stack_module_state(list(self.residents))

        def one(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return tuple(ask_with(weights | buffers, self.residents[0], question, patches_BME, positions_BM))

        # vmap would loop over the teachers at the CPU's fused attention, and at CUDA's it has no valid gradient.
        with sdpa_kernel(SDPBackend.MATH):
            stacked: tuple[Tensor, ...] = torch.vmap(one)(*self._stack)
        return stacked
