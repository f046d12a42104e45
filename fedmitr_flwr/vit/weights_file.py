"""Files of weights that were made elsewhere: read where they are safetensors, named as what they are where not."""

import re
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..common.errors import ModelError, unread

_PATCHES = "patch_embed.proj.weight"  # in every ViT, once
_PREFIX = re.compile(r"^(?:(?:module|model|_orig_mod|state_dict|backbone|network|net)\.)+")
_CONVERT = """python -c "import sys, torch; from safetensors.torch import save_file; \
s = torch.load(sys.argv[1], map_location='cpu', weights_only=True); s = s.get('state_dict', s.get('model', s)); \
save_file({k: v.clone().contiguous() for k, v in s.items() if torch.is_tensor(v)}, sys.argv[2])" """
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves", "fetch them with `git lfs pull`"),
    (b"<", "a web page (HTML or XML)", "download the file itself"),
    (b"\x89HDF", "an HDF5 file (Keras)", "export the weights of a timm ViT from PyTorch as safetensors"),
    (b"GGUF", "a GGUF file", "give the original weights as safetensors"),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and give the safetensors file"),
    (b"{", "JSON text", "give the safetensors file that it belongs to"),
)
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the safetensors file that `model.weights` names.

    Raises:
        ModelError: it cannot be read; a file of another kind is named as such, with what to do.
    """
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        fix = f"give {inside[0]}" if len(inside) == 1 else "give the path of a safetensors file"
        raise ModelError(f"model.weights: {path} is a folder; {fix}")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ModelError(f"model.weights: {unread('weights file', path, error)}") from error
    if other := _other_kind(path, head):
        raise ModelError(f"model.weights: {path} is {other}")
    try:
        state: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.weights: cannot read {path} as safetensors: {error}; it may be cut off or damaged"
        ) from error
    if not state:
        raise ModelError(f"model.weights: {path} holds no tensors; give the path of a file of weights")
    return state


def _other_kind(path: Path, head: bytes) -> str | None:
    """What a file that is no safetensors is, and the fix."""
    if not head:
        return "empty; download or copy it again"
    if head[7:9] == b"\0{":  # a header of less than 2^56 bytes, in JSON: safetensors
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, kind, fix in _BEGINNINGS:
        if text.startswith(beginning.lower()):
            return f"{kind}; {fix}"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith(".npy") for name in names):
            return "a NumPy archive; convert it to safetensors"
        if not any(name.endswith("data.pkl") for name in names):
            return "a ZIP archive; unpack it, and give the safetensors file"
    elif not head.startswith(_PICKLES):
        return None
    paths = f"{shlex.quote(str(path))} {shlex.quote(path.stem + '.safetensors')}"
    return f"a PyTorch file, which may run code when it is read; convert it once: {_CONVERT}{paths}"


def without_prefix(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], str]:
    """The tensors without a wrapper's prefix (`module.`, `model.`, `_orig_mod.`, `backbone.`, ...), and that prefix.

    Raises:
        ModelError: there are two models in one file.
    """
    found = [name.removesuffix(_PATCHES) for name in state if name.endswith(_PATCHES)]
    prefixes = [prefix for prefix in found if not prefix or _PREFIX.fullmatch(prefix)]
    if len(prefixes) > 1:
        shown = " and ".join(repr(prefix + _PATCHES) for prefix in prefixes)
        raise ModelError(f"model.weights: {source!r} holds {len(prefixes)} models ({shown}); give a file of one")
    prefix = prefixes[0] if prefixes else ""
    if not prefix:
        return dict(state), prefix
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():  # a head may stand beside the backbone
        bare = name.removeprefix(prefix) if name.startswith(prefix) else _PREFIX.sub("", name, count=1)
        if bare in named:
            raise ModelError(f"model.weights: {source!r} holds {bare!r} under two names; give a file of one model")
        named[bare] = tensor
    return named, prefix
