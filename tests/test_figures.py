"""The two pictures: what is faded, what is drawn, and that nothing overlaps or falls off."""

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from tiny import small
from torch import Tensor

from fedmitr_flwr.data.images import prepare
from fedmitr_flwr.report import figures
from fedmitr_flwr.report.figures import _fade, save_images, save_partition


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, so that their texts can be read."""
    saved: list[Figure] = []
    save = figures.save

    def keep(figure: Figure, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save", keep)
    return saved


def some_images(count: int, channels: int, size: int, grid: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, channels, size, size), generator=rng, dtype=torch.uint8)
    return prepare(pixels, small(size, channels)), torch.rand(count, grid**2, generator=rng) < 0.6


def outside(figure: Figure) -> list[str]:
    """Texts that are not wholly inside the picture."""
    figure.draw_without_rendering()  # places everything anew: saving used another resolution
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width, height = figure.bbox.size
    texts = list(figure.texts)
    for axis in figure.axes:
        texts += [axis.title, *(axis.findobj(mpl.text.Text) if axis.axison else [])]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    return [text for text, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1]


def overlap(texts: list[mpl.text.Text], figure: Figure) -> bool:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [text.get_window_extent(renderer).padded(-0.25) for text in texts]  # half a pixel between two is nothing
    return any(box.overlaps(other) for number, box in enumerate(boxes) for other in boxes[:number])


def test_alive_patches_are_untouched_and_halted_ones_pale() -> None:
    pixels = torch.full((1, 1, 4, 4), 10, dtype=torch.uint8)
    alive = torch.tensor([[True, False, False, True]])  # row by row: upper left and lower right live
    faded = _fade(pixels, alive)
    blue = [round(0.3 * 10 + 0.7 * part) for part in (150, 180, 235)]
    assert faded[0, :, 0, 0].tolist() == faded[0, :, 3, 3].tolist() == [10, 10, 10]
    assert faded[0, :, 0, 2].tolist() == faded[0, :, 3, 1].tolist() == blue
    upper, lower = [True, True, False, False], [False, False, True, True]
    assert (faded[0] == 10).all(dim=0).tolist() == [upper, upper, lower, lower]


@pytest.mark.parametrize(("channels", "size", "grid"), [(1, 8, 4), (3, 96, 6)])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_images(tmp_path: Path, drawn: list[Figure], channels: int, size: int, grid: int, count: int) -> None:
    images, alive = some_images(count, channels, size, grid)
    classes = [f"class_with_long_name_{label}" for label in range(10)]
    targets = torch.arange(count) * 7 % 10
    save_images(images, alive, targets, classes, small(size, channels), tmp_path / "images.png")
    picture = imread(tmp_path / "images.png")
    assert picture.shape[0] > 100
    assert np.ptp(picture[..., :3]) > 0.5  # not blank
    (figure,) = drawn
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == min(count, 40)
    assert {axis.get_title() for axis in shown} == {"class_with_long…"}
    assert f"{min(count, 40)} of {count} synthetic images" in figure.get_suptitle()
    assert f"{100 * alive.float().mean().item():.0f} % of all patches alive" in figure.get_suptitle()
    assert outside(figure) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["images.png"]


def test_the_chosen_images_cover_all_classes_and_stand_under_their_own_name(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    targets = torch.arange(200) % 10
    pixels = (targets * 20).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)  # the colour tells the class
    alive = torch.ones(200, 16, dtype=torch.bool)
    save_images(prepare(pixels, small()), alive, targets, [*map(str, range(10))], small(), tmp_path / "i.png")
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == sorted(titles)
    assert all(titles.count(str(label)) == 4 for label in range(10))
    for axis in drawn[0].axes:
        assert axis.images[0].get_array()[0, 0].tolist() == [20 * int(axis.get_title())] * 3


@pytest.mark.parametrize("clients", [2, 20])
@pytest.mark.parametrize(("width", "name"), [(10, "{}"), (10, "automobile_{}"), (100, "aquarium_fish_{}")])
def test_partition(tmp_path: Path, drawn: list[Figure], clients: int, width: int, name: str) -> None:
    counts = torch.randint(0, 600, (clients, width), generator=torch.Generator().manual_seed(1))
    save_partition(counts, [name.format(label) for label in range(width)], tmp_path / "partition.png")
    (figure,) = drawn
    axis = figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("class", "client")
    assert [label.get_text() for label in axis.get_xticklabels()][3] == name.format(3)
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        f"{client}  (n = {counts[client].sum()})" for client in range(clients)
    ]
    written = [text.get_text() for text in axis.texts]
    assert written == ([str(count) for count in counts.flatten().tolist()] if width == 10 else [])
    assert outside(figure) == []
    assert not overlap([*axis.get_xticklabels(), *axis.get_yticklabels(), *axis.texts], figure)
    assert imread(tmp_path / "partition.png").shape[0] > 100


def test_class_names_are_no_formulas_and_equal_contents_make_equal_files(tmp_path: Path) -> None:
    images, alive = some_images(2, 1, 8, 4)
    names = ["$\\frac{$", "a_b^c$"]
    save_partition(torch.ones(2, 2, dtype=torch.int64), names, tmp_path / "p.png")
    for name in ("a.png", "b.png"):
        save_images(images, alive, torch.tensor([1, 0]), names, small(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pyplot_is_never_used(tmp_path: Path) -> None:
    """In a process of its own, since other tests load libraries that do."""
    code = f"""
import sys, torch
from pathlib import Path
from fedmitr_flwr.report.figures import save_partition
save_partition(torch.zeros(2, 2, dtype=torch.int64), ["a", "b"], Path({str(tmp_path / "p.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
