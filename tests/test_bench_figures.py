"""Figures of a bench: their data by hand, methods that can be told apart, and nothing on top of anything."""

import math
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import PLACES, an_entry, results
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fedmitr_flwr.bench import figures
from fedmitr_flwr.bench.figures import OURS, draw, points, recall, scatter, skew, styles
from fedmitr_flwr.bench.rows import Row, rows
from fedmitr_flwr.bench.spec import STRATEGIES

ONE_SHOT = ("fedavg", "adi", "dense", "coboosting", "fedmitr", "lda", "ridge", "fedpft", "ensemble", "feddf", "central")


def many() -> list[Row]:
    """A whole grid: all methods and strategies, four places, two seeds."""
    variants = [f"fedmitr-{mode}" for mode in ("dense", "pri", "none", "drop")]
    made = []
    for place, (partition, _) in enumerate(PLACES.items()):
        for number, label in enumerate((*ONE_SHOT, *variants)):
            spent = {"server_seconds": 0.1 * 10 ** (number % 4)}
            made += [an_entry(label, 20.0 + 15 * place + number + seed, seed, partition, **spent) for seed in (0, 1)]
        for number, name in enumerate(STRATEGIES):
            for rounds in (1, 10):
                made.append(an_entry(f"flower:{name}", 30.0 + 15 * place + number, 0, partition, rounds))
    return rows(results(made))


def test_points_by_hand() -> None:
    entries = [an_entry("fedmitr", 50.0, 0), an_entry("fedmitr", 54.0, 1), an_entry("fedavg", 40.0)]
    entries += [an_entry("flower:krum", 30.0, rounds=5), an_entry("flower:krum", 20.0, rounds=1)]
    found = points(rows(results(entries)), lambda row: row.cost("bytes_up"))
    deviation = pytest.approx(math.sqrt(8), abs=1e-9)  # (2² + 2²) / 1
    assert found["fedmitr"] == [(2e6, 52.0, deviation)]
    assert found["fedavg"] == [(2e6, 40.0, 0.0)]
    assert found["flower:krum"] == [(2e6, 20.0, 0.0), (1e7, 30.0, 0.0)]
    assert "clients alone, mean" not in found  # it has no bytes


def test_points_of_equal_cost_have_equal_places() -> None:
    found = [row for row in many() if row.cost("bytes_up") == 2e6]
    figure = scatter(found, styles(found, "fedmitr"), "bytes_up", 1e6, "MB", "digits")
    assert figure is not None
    drawn_at = [line.get_xdata()[0] for line in figure.axes[0].get_lines() if line.get_marker() not in ("None", "")]
    assert len(drawn_at) > 10
    assert set(drawn_at) == {2.0}


def test_every_method_looks_different() -> None:
    looks = styles(many(), "fedmitr")
    assert len(set(looks.values())) == len(looks) == len(ONE_SHOT) + 4 + len(STRATEGIES) + 2
    assert looks["fedmitr"].colour == OURS
    assert looks["fedmitr-dense"].hollow
    assert {label for label, style in looks.items() if style.colour == OURS} == {
        *("fedmitr", "fedmitr-dense", "fedmitr-pri", "fedmitr-none", "fedmitr-drop")
    }


def legend_and_axes(figure: Figure) -> tuple[Any, list[Any]]:
    """Their boxes in pixels, once everything is laid out."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    return figure.legends[0].get_window_extent(renderer), [axis.get_tightbbox(renderer) for axis in figure.axes]


def drawn() -> dict[str, Figure | None]:
    found = many()
    looks = styles(found, "fedmitr")
    return {
        "bytes": scatter(found, looks, "bytes_up", 1e6, "MB", "digits"),
        "seconds": scatter(found, looks, "server_seconds", 1.0, "s", "digits"),
        "skew": skew(found, looks, "digits"),
    }


@pytest.mark.parametrize("name", ["bytes", "seconds", "skew"])
def test_nothing_is_on_top_of_anything(name: str) -> None:
    figure = drawn()[name]
    assert figure is not None
    legend, axes = legend_and_axes(figure)
    assert not any(legend.overlaps(axis) for axis in axes)
    for number, axis in enumerate(axes):
        assert not any(axis.overlaps(other) for other in axes[:number])
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.width
    assert legend.y0 >= -1  # of a pixel


@pytest.mark.parametrize("name", ["bytes", "seconds", "recall"])
def test_a_small_picture_holds_its_title(name: str) -> None:
    found = rows(results([an_entry("fedmitr", 50.0), an_entry("fedavg", 30.0)]))
    looks = styles(found, "fedmitr")
    title = "a data set with a long name, 10 clients"
    figure = {
        "bytes": scatter(found, looks, "bytes_up", 1e6, "MB", title),
        "seconds": scatter(found, looks, "server_seconds", 1.0, "s", title),
        "recall": recall(found, found[0].place),
    }[name]
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_suptitle() and figure._suptitle.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call]
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_skew_is_in_order_and_has_the_rounds_with_most() -> None:
    figure = drawn()["skew"]
    assert figure is not None
    (axis,) = figure.axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == [
        "2 classes",
        "Dirichlet 0.1",
        "Dirichlet 0.5",
        "IID",
    ]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "flower:krum, 10 rounds" in names
    assert "fedmitr-dense" not in names
    ours = [line for line in axis.get_lines() if to_hex(line.get_color()).upper() == OURS and line.get_marker() == "*"]
    heights = sorted(tuple(line.get_ydata()) for line in ours)
    assert heights == [(24.5, 39.5), (54.5,), (69.5,)]  # fedmitr is number 4: 20 + 15 place + 4, mean of + 0 and + 1


def test_one_place_has_no_skew() -> None:
    found = rows(results([an_entry("fedmitr", 50.0)]))
    assert skew(found, styles(found, "fedmitr"), "digits") is None


def test_the_heat_map_is_the_recall() -> None:
    found = rows(results([an_entry("fedmitr", 50.0), an_entry("fedavg", 30.0)]))
    figure = recall(found, found[0].place)
    assert figure is not None
    assert figure.axes[0].images[0].get_array().tolist() == [[60.0, 40.0], [40.0, 20.0]]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["fedmitr", "fedavg"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["60", "40", "40", "20"]


def test_all_pictures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(figures, "save", lambda _, path: saved.append(path.name))
    made = [an_entry(label, 50.0, 0, partition) for label in ("fedmitr", "lda") for partition in ("2 classes", "IID")]
    (tmp_path / "digits-K4-recall-dirichlet-0.1.png").write_bytes(b"of an earlier grid")
    assert draw(results(made), tmp_path) == 5
    assert not list(tmp_path.iterdir())
    assert saved == [f"digits-K4-{name}.png" for name in ("bytes", "seconds", "skew", "recall-2-classes", "recall-iid")]
