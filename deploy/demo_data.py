"""Folders of images as clients keep them, made from tensors: Parquet with names of any kind, or a folder per class."""

import io
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fedmitr_flwr.data.images import Images


def png(pixels_CHW: object) -> bytes:
    array = np.asarray(pixels_CHW)
    buffer = io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def as_parquet(
    folder: Path, images: Images, names: Sequence[str], kind: str = "ClassLabel", file: str = "train.parquet"
) -> Path:
    """Write `images`, whose label y is called `names[y]`, with labels of one `kind`; gives the folder.

    ClassLabel: numbers by the names in reverse order; text; category: as pandas writes them; number: of numerals.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(pixels), "path": None} for pixels in images.pixels.numpy()]
    called = [names[label] for label in images.labels.tolist()]
    own = sorted(set(names), reverse=True)  # another order than the server's
    if kind == "ClassLabel":
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=own)})
        columns = {"image": cells, "label": [own.index(name) for name in called]}
        table = pa.table(columns, schema=features.arrow_schema)
    else:
        pictures = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        labels = pa.array([int(name) for name in called]) if kind == "number" else pa.array(called)
        table = pa.table({"image": pictures, "label": labels.dictionary_encode() if kind == "category" else labels})
    pq.write_table(table, folder / file)
    return folder


def as_folders(folder: Path, images: Images, names: Sequence[str]) -> Path:
    """Write `<class>/<number>.png`; classes without images have no folder. Gives the folder."""
    for number, (pixels, label) in enumerate(zip(images.pixels.numpy(), images.labels.tolist(), strict=True)):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05}.png").write_bytes(png(pixels))
    return folder
