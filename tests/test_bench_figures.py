"""Figures of a bench: their data by hand, methods that can be told apart, and nothing on top of anything."""

import math
from pathlib import Path

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
VARIANTS = ("fedmitr-dense", "fedmitr-pri", "fedmitr-none", "fedmitr-drop")


@pytest.fixture(scope="module")
def many() -> list[Row]:
    """A whole grid: all methods and strategies, four places, two seeds."""
    made = []
    for place, (partition, _) in enumerate(PLACES.items()):
        for number, label in enumerate((*ONE_SHOT, *VARIANTS)):
            spent = {"server_seconds": 0.1 * 10 ** (number % 4)}
            made += [an_entry(label, 20.0 + 15 * place + number + seed, seed, partition, **spent) for seed in (0, 1)]
        for number, name in enumerate(STRATEGIES):
            for rounds in (1, 10):
                made.append(an_entry(f"flower:{name}", 30.0 + 15 * place + number, 0, partition, rounds))
    return rows(results(made))


@pytest.fixture
def two() -> list[Row]:
    """Two methods at one place."""
    return rows(results([an_entry("fedmitr", 50.0), an_entry("fedavg", 30.0)]))


def drawn(name: str, found: list[Row], title: str = "digits") -> Figure:
    looks = styles(found, "fedmitr")
    figure = {
        "bytes": lambda: scatter(found, looks, "bytes_up", 1e6, "MB", title),
        "seconds": lambda: scatter(found, looks, "server_seconds", 1.0, "s", title),
        "skew": lambda: skew(found, looks, title),
        "recall": lambda: recall(found, found[0].place),
    }[name]()
    assert figure is not None
    return figure


def test_points_by_hand() -> None:
    entries = [an_entry("fedmitr", 50.0, 0), an_entry("fedmitr", 54.0, 1), an_entry("fedavg", 40.0)]
    entries += [an_entry("flower:krum", 30.0, rounds=5), an_entry("flower:krum", 20.0, rounds=1)]
    assert points(rows(results(entries)), lambda row: row.cost("bytes_up")) == {  # not of clients alone: no bytes
        "fedmitr": [(2e6, 52.0, pytest.approx(math.sqrt(8), abs=1e-9))],  # (2² + 2²) / 1
        "fedavg": [(2e6, 40.0, 0.0)],
        "flower:krum": [(2e6, 20.0, 0.0), (1e7, 30.0, 0.0)],
    }


def test_points_of_equal_cost_have_equal_places(many: list[Row]) -> None:
    figure = drawn("bytes", [row for row in many if row.cost("bytes_up") == 2e6])
    drawn_at = [line.get_xdata()[0] for line in figure.axes[0].get_lines() if line.get_marker() not in ("None", "")]
    assert len(drawn_at) > 10
    assert set(drawn_at) == {2.0}


def test_every_method_looks_different(many: list[Row]) -> None:
    looks = styles(many, "fedmitr")
    assert len(set(looks.values())) == len(looks) == len(ONE_SHOT) + len(VARIANTS) + len(STRATEGIES) + 2
    assert {label for label, style in looks.items() if style.colour == OURS} == {"fedmitr", *VARIANTS}
    assert {label for label, style in looks.items() if style.hollow} == set(VARIANTS)


@pytest.mark.parametrize("name", ["bytes", "seconds", "skew"])
def test_nothing_is_on_top_of_anything(many: list[Row], name: str) -> None:
    figure = drawn(name, many)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # lays everything out
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    legend = figure.legends[0].get_window_extent(renderer)
    axes = [axis.get_tightbbox(renderer) for axis in figure.axes]
    for number, axis in enumerate(axes):
        assert not any(axis.overlaps(other) for other in (legend, *axes[:number]))
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.width
    assert legend.y0 >= -1  # of a pixel


@pytest.mark.parametrize("name", ["bytes", "seconds", "recall"])
def test_a_small_picture_holds_its_title(two: list[Row], name: str) -> None:
    figure = drawn(name, two, "a data set with a long name, 10 clients")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_suptitle() and figure._suptitle.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call]
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_skew_is_in_order_and_has_the_rounds_with_most(many: list[Row], two: list[Row]) -> None:
    figure = drawn("skew", many)
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
    assert skew(two, styles(two, "fedmitr"), "digits") is None  # of one place


def test_the_heat_map_is_the_recall(two: list[Row]) -> None:
    (axis, _) = drawn("recall", two).axes
    assert axis.images[0].get_array().tolist() == [[60.0, 40.0], [40.0, 20.0]]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["fedmitr", "fedavg"]
    assert [text.get_text() for text in axis.texts] == ["60", "40", "40", "20"]


def test_all_pictures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(figures, "save", lambda _, path: saved.append(path.name))
    made = [an_entry(label, 50.0, 0, partition) for label in ("fedmitr", "lda") for partition in ("2 classes", "IID")]
    (tmp_path / "digits-K4-recall-dirichlet-0.1.png").write_bytes(b"of an earlier grid")
    assert draw(results(made), tmp_path) == 5
    assert not list(tmp_path.iterdir())
    assert saved == [f"digits-K4-{name}.png" for name in ("bytes", "seconds", "skew", "recall-2-classes", "recall-iid")]
