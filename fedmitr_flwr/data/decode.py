"""Encoded pictures (PNG, JPEG, WebP and whatever else Pillow reads) to one uint8 tensor.

A file is decoded to what a viewer shows of it: upright, in its own colours, what is transparent on white, and of an
animation or of several pages the first. Samples of 16 bits become 8 by the bits that the images really use. What is
not as the file has it, or only a part of it, is counted in one line of the log.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor

from ..common.errors import DataError, printable

log = logging.getLogger("fedmitr")

PixelArray = NDArray[np.uint8]
Rows = NDArray[np.int64]

_KEPT = 128 * 128  # pixels of an image that keeps its size whatever the model's: 20,000 of them in colour are 1 GB
_MEGAPIXEL = 1 << 20  # JPEGs beyond are decoded at an eighth to a half of their size where that is enough
_DEPTHS = (8, 10, 12, 14, 16)  # bits of the cameras, scanners and detectors that write files of 16

_MAY_BE_TURNED = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where Pillow keeps an orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC, _SAMPLE_FORMAT, _BITS_PER_SAMPLE = 262, 339, 258  # TIFF tags
_WHITE_IS_ZERO, _SIGNED = 0, 2

# What is counted of a split's images.
_ANIMATED = "are animated or have several pages; the first frame is used"
_CLEAR = "are transparent everywhere, and so all white; save them without an alpha channel if it means nothing"
_BROKEN_EXIF = "have EXIF data that cannot be read; they are taken as they are stored, upright or not"
_DEEP = "have 16 bits"  # and are grey
_DEEP_COLOUR = "have colours of 16 bits"  # of which Pillow reads the higher 8


class Encoded(Protocol):
    """Images before decoding."""

    def where(self, row: int) -> str:
        """The place of a row, for messages."""

    def encoded(self, rows: Rows) -> Iterator[BinaryIO]:
        """The encoded images of `rows` (rising), in that order, each open until the next."""


class Split(Encoded, Protocol):
    """A train or test split before decoding."""

    @property
    def labels(self) -> Rows:
        """(n,) as the source has them, unchecked."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, where the source knows them."""


class _Picture(NamedTuple):
    image: Image.Image  # L or RGB, upright and opaque
    large: bool  # too large to be kept at its size, of which `image` may be a fraction
    notes: tuple[str, ...]  # _ANIMATED and the others below its name
    largest: int  # value, of 16 bits, where the notes have _DEEP or _DEEP_COLOUR


def decode(split: Encoded, rows: Rows, in_chans: int, img_size: int) -> Tensor:
    """Decode `rows` to uint8 (n, C, H, W), one at a time: the memory needed is that of the result.

    Images of one size keep it, and with it their bytes, if it is at most 128 x 128 or four times the model's pixels.
    All others are resized to `img_size` as they are decoded (antialiased bilinear). A JPEG beyond one megapixel is read
    at 1/2, 1/4 or 1/8 of its size if that leaves four pixels for each of the model's along both sides.

    Grey images of 16 bits are scaled by the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value in
    `rows`, unless the file itself states its range; they are decoded again where that is not 16. There is no thread
    pool: at 28 to 256 px it measured slower than one thread.

    Raises:
        DataError: an image is unreadable, or its values have no fixed range; its file or row is named.
    """
    pixels = _Pixels(len(rows), in_chans, img_size)
    notes: dict[str, list[int]] = {}
    largest: dict[str, int] = {}
    for i, picture in enumerate(_pictures(split, rows, in_chans, img_size)):
        pixels.put(i, picture)
        for note in picture.notes:
            notes.setdefault(note, []).append(i)
            largest[note] = max(largest.get(note, 0), picture.largest)
    if (bits := _bits(largest.get(_DEEP, 0))) < 16:
        deep = notes[_DEEP]
        for i, picture in zip(deep, _pictures(split, rows[deep], in_chans, img_size, bits), strict=True):
            pixels.put(i, picture)
    for note, seen in notes.items():
        first = printable(split.where(int(rows[seen[0]])))
        _log(f"{len(seen)} of {len(rows)} images", note, f"(the first: {first})", largest[note])
    return torch.from_numpy(pixels.array)


class _Pixels:
    """(n, C, H, W): at the size of the images while all have one that can be kept, then at the model's."""

    def __init__(self, number: int, in_chans: int, side: int) -> None:
        self.array: PixelArray = np.empty((0, in_chans, 0, 0), dtype=np.uint8)
        self._number, self._side = number, side
        self._resized = False

    def put(self, i: int, picture: _Picture) -> None:
        """The first time in the order of `i`."""
        size = (picture.image.height, picture.image.width)
        if not len(self.array):
            self._resized = picture.large
            self.array = self._empty((self._side, self._side) if picture.large else size)
        elif not self._resized and (picture.large or size != self.array.shape[2:]):
            self._resized = True
            native, self.array = self.array, self._empty((self._side, self._side))
            for j in range(i):
                image = native[j, 0] if len(native[j]) == 1 else np.ascontiguousarray(native[j].transpose(1, 2, 0))
                self.array[j] = _resize(Image.fromarray(image), self._side)
        self.array[i] = _resize(picture.image, self._side) if self._resized else _planes(picture.image)

    def _empty(self, size: tuple[int, int]) -> PixelArray:
        return np.empty((self._number, self.array.shape[1], *size), dtype=np.uint8)


def _resize(image: Image.Image, side: int) -> PixelArray:
    """(C, side, side), antialiased bilinear."""
    return _planes(image.resize((side, side), Image.Resampling.BILINEAR))


def _planes(image: Image.Image) -> PixelArray:
    """(C, H, W)."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _bits(largest: int) -> int:
    """The depth of values up to `largest`; images that are black have none of their own."""
    return next(bits for bits in _DEPTHS if largest < 1 << bits) if largest else 16


def _log(images: str, note: str, first: str, largest: int) -> None:
    bits = _bits(largest)
    if note not in (_DEEP, _DEEP_COLOUR):
        log.warning("%s %s %s", images, note, first)
    elif bits == 16:
        log.info("%s %s and use them; the higher 8 are kept %s", images, note, first)
    elif note == _DEEP:
        scale = f"0..{(1 << bits) - 1} becomes 0..255, 256 levels"
        others = "other splits and clients are scaled by what they use; save all in one range of 8 or 16 bits"
        log.warning("%s %s but use %d (largest: %d): %s; %s %s", images, note, bits, largest, scale, others, first)
    else:
        left = f"{1 << (bits - 8)} levels of 256 are left"
        log.warning("%s %s but use %d or fewer; %s; save them with 8 bits %s", images, note, bits, left, first)


@contextmanager
def opened(encoded: BinaryIO, where: str) -> Iterator[Image.Image]:
    """The image, of which no more than the header is read; in the block, whatever Pillow raises names the place.

    Raises:
        DataError: the image is unreadable.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # lines about single files, without their names
            with Image.open(encoded) as image:
                yield image
    except Exception as error:  # of any type: Pillow's plugins and codecs check little of what they read
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: not a readable image ({reason}); repair it or remove it") from error


def _pictures(split: Encoded, rows: Rows, in_chans: int, img_size: int, bits: int = 16) -> Iterator[_Picture]:
    """Grey of 16 bits is taken as of `bits`."""
    for row, encoded in zip(rows.tolist(), split.encoded(rows), strict=True):
        with opened(encoded, split.where(row)) as image:
            picture = _picture(image, in_chans, img_size, bits)
        yield picture


def _picture(image: Image.Image, in_chans: int, img_size: int, bits: int) -> _Picture:
    stored = image.width * image.height
    large = stored > max(_KEPT, 4 * img_size * img_size)
    if large and stored > _MEGAPIXEL:
        image.draft(None, (4 * img_size, 4 * img_size))  # does nothing but for JPEG
    raw, most = _raw(image)
    image.load()
    notes: tuple[str, ...] = ()
    largest = 0
    if image.mode[0] in "IF" or image.format in ("TIFF", "FITS"):
        _require_range(image)
    if image.mode[0] == "I":
        flat, largest = _of_16_bits(image, bits)
        if raw != "I;12" and not 255 < most < 65535:  # these state their range
            notes = (_DEEP,)
    else:
        flat = image
        if image.has_transparency_data:
            flat, clear = _on_white(image, raw)
            notes = (_CLEAR,) if clear else ()
        if ";16" in raw or most == 65535:
            high = int(np.asarray(_channels(image, 3)).max())
            notes += (_DEEP_COLOUR,)
            largest = max(high * 257 - 128, 1) if most else high << 8 | 255
    flat = _channels(flat, in_chans)
    orientation = _orientation(image)
    if orientation is None:
        notes += (_BROKEN_EXIF,)
    elif orientation in _TURNS:
        flat = flat.transpose(_TURNS[orientation])
    if flat is image and image.format == "GIF":
        flat = image.copy()  # to look for a second frame is to lose the first
    if _animated(image):
        notes += (_ANIMATED,)
    return _Picture(flat, large, notes, largest)


def _raw(image: Image.Image) -> tuple[str, int]:
    """How a file that is not loaded yet stores its samples: Pillow's raw mode, and of a PNM file its largest value."""
    tiles = getattr(image, "tile", ())
    if image.format not in ("PNG", "TIFF", "PPM", "SGI") or not tiles:
        return "", 0
    name, _, _, args = tiles[0]
    raw = args if isinstance(args, str) else str(args[0])
    return ("L;16B" if name == "SGI16" else raw), (int(args[1]) if name in ("ppm", "ppm_plain") else 0)


def _require_range(image: Image.Image) -> None:
    """Raise ValueError where black and white have no fixed values."""
    tags = getattr(image, "tag_v2", {})
    signed = _SIGNED in tags.get(_SAMPLE_FORMAT, ()) or (image.format == "FITS" and image.mode != "L")
    if signed or image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "signed samples" if signed else f"samples of Pillow's mode {image.mode}"
        raise ValueError(f"{kind} have no fixed range; save it with 8 or 16 unsigned bits")


def _of_16_bits(image: Image.Image, bits: int) -> tuple[Image.Image, int]:
    """Grey of 8 bits, and the largest value of 16 (Pillow's own conversion would clip these to white)."""
    values = np.asarray(image).astype(np.uint16)
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS_PER_SAMPLE) == (12,):
        values <<= 4
    clear = values == image.info["transparency"] if "transparency" in image.info else np.zeros((), dtype=np.bool_)
    largest = int(values.max(where=~clear, initial=0))
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts up to 8 bits only
        grey = 255 - grey
    return Image.fromarray(np.where(clear, np.uint8(255), grey)), largest


def _on_white(image: Image.Image, raw: str) -> tuple[Image.Image, bool]:
    """RGB, and whether nothing of the image is to be seen."""
    if "transparency" in image.info and image.mode in ("L", "RGB"):
        image.info["transparency"] = _clear_colour(image.info["transparency"], raw)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow has no way from La to RGBA but through L, without alpha
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    least, most = image.getchannel("A").getextrema()
    if least == 255:
        return image.convert("RGB"), False  # the same, and faster
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=image)
    return ground, most == 0


def _clear_colour(samples: int | tuple[int, ...], raw: str) -> int | tuple[int, ...]:
    """The transparent colour on the scale of the decoded image; Pillow leaves it on that of a PNG's samples."""
    if isinstance(samples, tuple):
        return tuple(sample >> 8 if ";16" in raw else sample & 255 for sample in samples)
    most = {"L;2": 3, "L;4": 15}.get(raw, 255)
    return (samples & most) * 255 // most


def _channels(image: Image.Image, in_chans: int) -> Image.Image:
    """Luminance for one channel, RGB (grey repeated) for three."""
    if image.mode in ("LAB", "YCbCr"):  # Pillow has no way from LAB to L; some values of YCbCr are no colours
        image = image.convert("RGB")
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int | None:
    """EXIF's, of a loaded image; None where the EXIF data that may state it cannot be read.

    ImageOps.exif_transpose would write the EXIF data anew as well, which fails where a part of them is broken.
    """
    if image.format == "TIFF" or _MAY_BE_TURNED.isdisjoint(image.info):  # Pillow turns TIFF itself
        return 1
    try:
        orientation = image.getexif().get(Base.Orientation)
        if orientation is None and "exif" in image.info:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                Image.Exif().load(image.info["exif"])  # aloud: JPEG's plugin has read them before, and kept quiet
    except Exception:  # of any type, or a warning
        return None
    return orientation or 1


def _animated(image: Image.Image) -> bool:
    if image.format in ("MPO", "PSD"):  # a camera's second image, such as a preview; layers under their composite
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # of any type: there is a second frame, if a broken one
        return True
