"""From encoded bytes, as Pillow shows them upright and flattened, to the model's input, normalised by hand."""

import io
import struct
import tracemalloc
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import small

from fedmitr_flwr.common.errors import DataError
from fedmitr_flwr.config import ModelConfig
from fedmitr_flwr.data.decode import decode
from fedmitr_flwr.data.images import DataSet, Images, prepare, to_uint8
from fedmitr_flwr.vit.names import normalisation

Pixels = NDArray[np.uint8]
SIDE = 8
EXIF_6 = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"  # Orientation = 6 and nothing else
BITS_PER_SAMPLE, PHOTOMETRIC, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 262, 338, 339  # TIFF tags
# By the EXIF standard: the step along the rows of what is stored (-1 mirrors it), and then quarter turns to the left.
UPRIGHT = {1: (1, 0), 2: (-1, 0), 3: (1, 2), 4: (-1, 2), 5: (-1, 1), 6: (1, 3), 7: (-1, 3), 8: (1, 1)}
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "L tRNS", "RGB tRNS", "P tRNS"),
    "TIFF": ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"),
    "WEBP": ("L", "RGB", "RGBA"),
    "AVIF": ("L", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "MPO": ("L", "RGB"),
    "GIF": ("L", "P", "P tRNS"),
}


def decoded(*files: bytes, in_chans: int = 1, img_size: int = SIDE) -> torch.Tensor:
    split = SimpleNamespace(where="row {}".format, encoded=lambda rows: (io.BytesIO(files[row]) for row in rows))
    return decode(split, np.arange(len(files)), in_chans, img_size)


def flat(file: bytes, in_chans: int = 1) -> list[Any]:
    """The pixels of one image of height 1: grey values, or [R, G, B] each."""
    line = decoded(file, in_chans=in_chans)[0, :, 0]
    return line[0].tolist() if in_chans == 1 else line.T.tolist()


def encode(image: Image.Image | NDArray[Any], form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def png(row: bytes, width: int, depth: int, colour: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """One row of raw samples, for what Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def grey16(*values: int) -> bytes:
    return encode(np.array([values], dtype=np.uint16))


def with_tag(tiff: bytes, tag: int, value: int) -> bytes:
    """A TIFF of Pillow's with a 16-bit tag changed, for what Pillow reads but does not write."""
    at = tiff.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return tiff[:at] + struct.pack("<H", value) + tiff[at + 2 :]


@pytest.mark.parametrize(("form", "kind"), [(form, kind) for form, kinds in FORMATS.items() for kind in kinds])
@settings(derandomize=True, max_examples=16)
@given(st.integers(0, 999), st.integers(1, 8), st.sampled_from([0, 128, 255, None]), st.booleans())
def test_modes_and_formats(form: str, kind: str, seed: int, orientation: int, alpha: int | None, grey: bool) -> None:
    """It is what Pillow shows, upright on white."""
    mode, _, key = kind.partition(" ")
    rgba = np.random.default_rng(seed).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    if alpha is not None:
        rgba[..., 3] = alpha
    stored = _in_mode(Image.fromarray(rgba), mode)
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    if form == "MPO":
        options |= {"save_all": True, "append_images": [stored]}
    if key:
        clear = 3 if form == "GIF" else bytes(range(0, 250, 25))
        options["transparency"] = clear if mode == "P" else stored.getpixel((0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, file = encode(stored, form, **options), encode(stored, form, **options, exif=exif)
    if mode == "La":
        plain, file = with_tag(plain, EXTRA_SAMPLES, 1), with_tag(file, EXTRA_SAMPLES, 1)
    image: Image.Image = Image.open(io.BytesIO(plain))
    assert image.mode == mode or form not in ("PNG", "TIFF")
    if mode in ("La", "LAB"):  # Pillow has no way to RGBA from these
        image = image.convert({"La": "LA", "LAB": "RGB"}[mode])
    shown = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    expected = np.asarray(shown.convert("L") if grey else shown).reshape(5, 7, -1)
    step, turns = UPRIGHT[1 if form == "GIF" else orientation]  # GIF has no EXIF
    pixels = decoded(file, in_chans=1 if grey else 3)[0].permute(1, 2, 0).numpy()
    off = 0 if alpha in (0, 255) and not key else 1
    np.testing.assert_allclose(pixels, np.rot90(expected[:, ::step], turns), rtol=0, atol=off)


def _in_mode(rgba: Image.Image, mode: str) -> Image.Image:
    if mode == "PA":
        return Image.merge("PA", (rgba.convert("RGB").quantize(16), rgba.getchannel("A")))
    if mode in ("RGBA", "LA", "La"):
        return rgba.convert(mode.replace("a", "A"))  # as La it is saved under another tag
    return rgba.convert("RGB").convert(mode)


def test_what_is_transparent_is_white(caplog: pytest.LogCaptureFixture) -> None:
    half = encode(Image.new("LA", (1, 1), (50, 128)), "TIFF")
    for file, levels in (
        (encode(Image.new("RGBA", (1, 1), (0, 0, 0, 0))), [255]),
        (encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128))), [127]),
        (with_tag(half, EXTRA_SAMPLES, 1), [50 + 127]),  # premultiplied
        (png(b"\x0f", 8, 1, 0, chunk(b"tRNS", b"\0\0")), [255] * 8),  # the samples are 00001111, and 0 is transparent
        (png(b"\x1b", 4, 2, 0, chunk(b"tRNS", b"\0\1")), [0, 255, 170, 255]),  # 0 1 2 3
        (png(b"\x25", 2, 4, 0, chunk(b"tRNS", b"\0\2")), [255, 85]),  # 2 5
        (png(b"\x02\x25", 2, 8, 0, chunk(b"tRNS", b"\0\2")), [255, 37]),
        (png(b"\x03\xe8\xf0\0", 2, 16, 0, chunk(b"tRNS", b"\x03\xe8")), [255, 240]),  # 1000 61440
        (png(b"\1\0" * 3 + b"\x40\0" * 3, 2, 16, 2, chunk(b"tRNS", b"\1\0" * 3)), [255, 64]),
        (png(b"\0\0\0\0\x80\0\xff\xff", 2, 16, 4), [255, 128]),  # grey and alpha of 16 bits
    ):
        assert flat(file) == levels
        assert flat(file, 3) == [[level] * 3 for level in levels]
    caplog.clear()
    clear, hardly = (encode(Image.new("RGBA", (2, 2), (9, 9, 9, alpha))) for alpha in (0, 1))
    decoded(hardly, clear, clear)
    (line,) = caplog.messages
    assert line.startswith("2 of 3 images are transparent everywhere, and so all white")


def test_orientation_is_found_wherever_a_format_keeps_it_and_applied_once() -> None:
    late = png(bytes(range(6)), 6, 8, 0, after=chunk(b"eXIf", EXIF_6[6:]))
    assert decoded(late)[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    text, picture, xmp = PngInfo(), noise(4, 6, 3), '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text.add_itxt("XML:com.adobe.xmp", xmp)
    for file in (
        encode(picture, "PNG", pnginfo=text),
        encode(picture, "WEBP", lossless=True, xmp=xmp.encode()),
        encode(picture, "TIFF", tiffinfo={274: 6, 700: xmp.encode()}),
        encode(picture, "TIFF", compression="tiff_lzw", tiffinfo={274: 6}),
    ):
        assert np.array_equal(decoded(file, in_chans=3)[0].permute(1, 2, 0).numpy(), np.rot90(picture, -1))
    for form in ("JPEG", "AVIF"):
        assert decoded(encode(picture, form, xmp=xmp.encode()), in_chans=3).shape == (1, 3, 6, 4)


def test_broken_exif_kills_no_picture_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    exif, picture = Image.Exif(), noise(4, 6, 3)
    exif[0x0112], exif[0x0131] = 6, "software" * 9  # a sound orientation beside a broken tag is applied
    assert decoded(encode(picture, "WEBP", exif=exif.tobytes()[:-20])).shape == (1, 1, 6, 4)
    assert not caplog.messages
    broken = [b"Exif\0\0garbage", EXIF_6[:12], EXIF_6[:18]]
    files = [encode(picture, form, exif=exif) for exif in broken for form in ("PNG", "JPEG")]
    for image in decoded(*files, encode(picture), in_chans=3)[::2]:
        assert np.array_equal(image.permute(1, 2, 0).numpy(), picture)
    line = "6 of 7 images have EXIF data that cannot be read; they are taken as they are stored, upright or not"
    assert caplog.messages == [f"{line} (the first: row 0)"]


def test_sixteen_bits_are_scaled_by_what_the_split_uses(caplog: pytest.LogCaptureFixture) -> None:
    """There is one scale for a split of several sizes and depths."""
    caplog.set_level("WARNING", "fedmitr")
    for values, bits, grey in (
        ((0, 320, 3680), 12, [0, 20, 230]),
        ((0, 255), 8, [0, 255]),
        ((4, 1023), 10, [1, 255]),
        ((64, 16383), 14, [1, 255]),
        ((256, 16384), 16, [1, 64]),
        ((0, 0), 16, [0, 0]),
    ):
        caplog.clear()
        tiff = encode(np.array([values], dtype=">u2"), "TIFF")
        pgm = b"P5 %d 1 65535\n" % len(values) + np.array(values, dtype=">u2").tobytes()
        plain = b"P2 %d 1 65535\n" % len(values) + b" ".join(b"%d" % value for value in values)
        for file in (grey16(*values), tiff, pgm, plain):
            assert flat(file) == grey
            assert flat(file, 3) == [[level] * 3 for level in grey]
        scale = f"(largest: {max(values)}): 0..{2**bits - 1} becomes 0..255, 256 levels"
        said = [line.startswith(f"1 of 1 images have 16 bits but use {bits} {scale}") for line in caplog.messages]
        assert said == [True] * (8 if bits < 16 else 0)
    pixels = decoded(grey16(160), encode(np.full((1, 1), 77, dtype=np.uint8)), grey16(4095, 0, 0), grey16(1023))
    assert pixels.shape == (4, 1, SIDE, SIDE)
    assert pixels[:, 0, 0, 0].tolist() == [10, 77, 255, 63]


def test_a_range_that_the_file_states_is_its_range_without_one_it_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Colours of 16 bits that use fewer are warned of."""
    caplog.set_level("WARNING", "fedmitr")
    assert flat(b"P5 2 1 4095\n" + struct.pack(">2H", 0, 900)) == [0, 56]
    assert flat(b"P2 2 1 1000\n0 500") == [0, 128]
    packed = encode(np.array([[0x1000, 0x00FF]], dtype="<u2"), "TIFF")  # of 12 bits: 0x001, 0x0FF
    assert flat(with_tag(packed, BITS_PER_SAMPLE, 12)) == [0, 15]
    assert not caplog.messages
    white_is_zero = encode(np.array([[0, 1024, 65535]], dtype=np.uint16), "TIFF")
    assert flat(with_tag(white_is_zero, PHOTOMETRIC, 0)) == [255, 251, 0]
    dark, full = struct.pack(">3H", 100, 4095, 0), struct.pack(">3H", 256, 65535, 0)
    for file in (png(full, 1, 16, 2), b"P6 1 1 65535\n" + full):
        assert flat(file, 3) == [[1, 255, 0]]
    assert not caplog.messages
    for file in (png(dark, 1, 16, 2), b"P6 1 1 65535\n" + dark):
        flat(file, 3)
        line = caplog.messages[-1]
        assert line.startswith("1 of 1 images have colours of 16 bits but use 12 or fewer; 16 levels of 256 are left")
    fraction, signed = np.ones((2, 2), dtype=np.float32), np.ones((2, 2), dtype=np.int32)
    tagged = (encode(np.ones((2, 2), dtype=kind), "TIFF", tiffinfo={339: 1}) for kind in (np.uint16, np.uint8))
    files = {
        "samples of Pillow's mode F": [encode(fraction, "TIFF"), encode(fraction, "PPM")],
        "signed": [encode(signed, "TIFF"), *(with_tag(file, SAMPLE_FORMAT, 2) for file in tagged)],
    }
    for kind, file in ((kind, file) for kind, each in files.items() for file in each):
        with pytest.raises(DataError, match=f"row 1: .*{kind}.* no fixed range; save it with 8 or 16 unsigned bits"):
            decoded(encode(np.zeros((2, 2), dtype=np.uint8)), file)


def test_of_an_animation_the_first_frame_is_used_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    forms = {"GIF": "L", "PNG": "RGB", "WEBP": "RGB", "TIFF": "L", "AVIF": "RGB", "MPO": "RGB"}
    line = "2 of 3 images are animated or have several pages; the first frame is used (the first: row 1)"
    for form, mode in forms.items():
        caplog.clear()
        first, *others = (Image.new(mode, (8, 8), colour) for colour in ("white", "black", "red"))
        file = encode(first, form, save_all=True, append_images=others)
        assert int(decoded(encode(others[0], "GIF"), file, file)[1:].min()) >= 254
        assert caplog.messages == ([line] if form != "MPO" else [])  # a camera's second image is none to train on
    caplog.clear()
    first = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    file = encode(first, "GIF", save_all=True, append_images=[first.rotate(90)])
    for end in range(-60, -1, 7):  # a broken second frame
        assert np.array_equal(decoded(file[:end])[0, 0].numpy(), np.asarray(first))
    assert caplog.messages


def test_images_of_one_size_keep_it_if_it_is_modest_and_others_are_resized_one_by_one() -> None:
    for side in (128, 129):
        pictures = noise(2, side, side)
        wanted = pictures if side == 128 else list(map(resized, pictures))
        assert np.array_equal(decoded(*map(encode, pictures))[:, 0].numpy(), wanted)
        assert decoded(encode(pictures[0]), img_size=65).shape[-1] == side  # up to twice the model's side it is
    alike, others = noise(2, 20, 12, 3), [noise(12, 20, 3), noise(1, 40_000, 3), noise(SIDE, SIDE, 3)]
    for mixed in ([*alike, *others], [*others, *alike], others[1:]):
        pixels = decoded(*map(encode, mixed), in_chans=3).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(pixels, list(map(resized, mixed)))
    assert decoded(*map(encode, alike)).shape == (2, 1, 20, 12)


def resized(picture: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def test_memory_follows_the_models_size() -> None:
    """A large JPEG is decoded in part, and differs by less than rounding."""
    for others in (28, 600):
        large, other = (encode(np.zeros((side, side, 3), dtype=np.uint8)) for side in (600, others))
        tracemalloc.start()
        decoded(large, *[other] * 20, in_chans=3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1000 * 1000  # at their own sizes they are 22 MB; Pillow's one image at a time is not in it
    file = encode(Image.fromarray(noise(40, 50, 3)).resize((1500, 1200), Image.Resampling.BICUBIC), "JPEG", quality=90)
    whole = np.asarray(Image.open(io.BytesIO(file)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    assert np.abs(decoded(file, in_chans=3)[0].permute(1, 2, 0).numpy().astype(int) - whole).max() <= 2


def test_whatever_pillow_raises_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of AVIF it is a RuntimeError, of ICNS an AssertionError, of BLP one of its own; of half a bomb nothing."""
    for form in ("AVIF", "JPEG", "PNG", "TIFF", "WEBP", "BLP", "GIF", "ICNS"):
        rng = np.random.default_rng(0)
        picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        whole = encode(picture.quantize(8) if form in ("BLP", "GIF", "ICNS") else picture, form)
        files = [b"", b"no image at all", whole[: len(whole) // 2]]
        for _ in range(60):
            altered = np.frombuffer(whole, np.uint8).copy()
            altered[rng.integers(0, min(len(whole), 300), 5)] = rng.integers(0, 256, 5)
            files.append(altered.tobytes())
        messages = []
        for file in files:
            try:
                decoded(file)
            except DataError as error:
                messages.append(str(error))
        assert len(messages) > 5
        assert all(message.startswith("row 0: not a readable image (") for message in messages), form
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # above it Pillow warns, above twice of it it raises
    assert decoded(encode(np.zeros((8, 8), dtype=np.uint8))).shape == (1, 1, 8, 8)
    with pytest.raises(DataError, match=r"^row 0: not a readable image .*decompression bomb.*$"):
        decoded(encode(np.zeros((12, 12), dtype=np.uint8)))


def test_to_uint8_is_the_inverse_of_prepare_and_clamps() -> None:
    """Resizing agrees with Pillow's, and keeps a flat image flat."""
    for in_chans in (1, 3):
        pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, in_chans, 1, 1)  # every value
        model = small(16, in_chans)
        assert torch.equal(to_uint8(prepare(pixels, model).requires_grad_(), model), pixels)
    images = torch.tensor([-9.0, 0.0, 9.0]).reshape(1, 1, 1, 3)
    assert to_uint8(images, small()).flatten().tolist() == [0, 128, 255]
    picture = noise(28, 28)
    reference = torch.tensor(np.array(Image.fromarray(picture).resize((16, 16), Image.Resampling.BILINEAR))).int()
    ours = to_uint8(prepare(torch.tensor(picture)[None, None], small(16)), small())[0, 0].int()
    assert (ours - reference).abs().max() <= 1  # Pillow rounds each pass
    flat = torch.full((2, 3, 20, 12), 77, dtype=torch.uint8)
    assert (to_uint8(prepare(flat, small(8, 3)), small(8, 3)) == 77).all()


def test_pixels_are_normalised_as_the_models_weights_were_trained() -> None:
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for name, in_chans, wanted in (
        ("small", 2, ((0.5,) * 2, (0.5,) * 2)),
        ("small", 3, imagenet),
        ("deit_tiny_patch16_224", 3, imagenet),
        ("deit_tiny_patch16_224", 1, ((1.347 / 3,), (0.678 / 3,))),  # the mean over channels, by hand
        ("vit_tiny_patch16_224", 3, ((0.5,) * 3, (0.5,) * 3)),  # augreg
        ("vit_base_patch32_clip_224", 3, clip),
    ):
        found = normalisation(ModelConfig(name=name, in_chans=in_chans))
        torch.testing.assert_close(torch.stack(found), torch.tensor(wanted))
    # Half is taken off the 0..1 scale, and the rest divided by a half: 51 is 0.2, so -0.3, so -0.6.
    assert prepare(torch.tensor([[[[51]]]], dtype=torch.uint8), small(1)).item() == pytest.approx(-0.6, abs=1e-5)
    # ImageNet: (1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225
    colour = prepare(torch.tensor([255, 0, 51], dtype=torch.uint8).reshape(1, 3, 1, 1), small(1, 3))
    assert colour.flatten().tolist() == pytest.approx([2.248908, -2.035714, -0.915556], abs=1e-5)


def test_subset_follows_the_indices_and_copies(tiny: DataSet) -> None:
    before = tiny.train.pixels.clone()
    picked = tiny.train.subset(torch.tensor([5, 2]))
    assert picked.labels.tolist() == [2, 2]
    assert torch.equal(picked.pixels, before[[5, 2]])
    picked.pixels.zero_()
    assert torch.equal(tiny.train.pixels, before)
    for pixels, labels in ((before, tiny.train.labels[:1]), (before.float(), tiny.train.labels)):  # do not match
        with pytest.raises(AssertionError):
            Images(pixels, labels)
