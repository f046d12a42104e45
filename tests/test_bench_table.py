"""Tables and figures of a bench: numbers by hand; what is bold, marked, left out; nothing on top of anything."""

import csv
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import PLACES, an_entry, results
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fedmitr_flwr.bench import figures
from fedmitr_flwr.bench.command import bench
from fedmitr_flwr.bench.figures import OURS, dots, draw, recall
from fedmitr_flwr.bench.markup import spread as as_text
from fedmitr_flwr.bench.markup import tabular
from fedmitr_flwr.bench.results import load, save
from fedmitr_flwr.bench.rows import Row, p_value, reference_of, rows
from fedmitr_flwr.bench.stats import Spread, holm, paired_p
from fedmitr_flwr.bench.table import as_csv, latex, markdown
from fedmitr_flwr.common.errors import ConfigError, RunError
from fedmitr_flwr.flower.strategies import STRATEGIES

# Differences from fedmitr: 2, 4, 7 (lda), and -20, -20.5, -19.5 (fedavg)
FEDMITR, LDA, FEDAVG = (48.0, 50.0, 57.0), (50.0, 54.0, 64.0), (28.0, 29.5, 37.5)


def seeds(label: str, values: tuple[float, ...], **changes: Any) -> list[dict[str, Any]]:
    return [an_entry(label, value, seed, **changes) for seed, value in enumerate(values)]


def three_methods(**changes: Any) -> list[dict[str, Any]]:
    of = {"fedmitr": FEDMITR, "lda": LDA, "fedavg": FEDAVG}
    return [entry for label, values in of.items() for entry in seeds(label, values, **changes)]


def spread(*values: float) -> Spread:
    return Spread(dict(enumerate(values)))


def test_mean_and_sample_deviation_by_hand() -> None:
    # mean (50 + 54 + 64) / 3 = 56; squares 36 + 4 + 64 = 104; 104 / (3 - 1) = 52; √52 = 7.2111
    assert (spread(*LDA).mean, spread(*LDA).std) == (56.0, pytest.approx(7.2111, abs=1e-4))
    assert (spread(50.0).std, spread(50.0).n) == (None, 1)
    assert (as_text([50.0, 54.0, 64.0]), as_text([50.0, None]), as_text([None])) == ("56.0 ± 7.2 (3)", "50.0 (1)", "-")


def test_the_paired_test_by_hand() -> None:
    # differences 2, 4, 7: mean 13/3, deviation 2.51661, t = 4.33333 / (2.51661 / √3) = 2.98240. For two degrees of
    # freedom p = 1 - t / √(t² + 2) = 1 - 2.98240 / 3.30069 = 0.09643
    assert paired_p(spread(*LDA), spread(*FEDMITR)) == pytest.approx(0.09643, abs=1e-5)
    assert paired_p(spread(*FEDMITR), spread(*LDA)) == pytest.approx(0.09643, abs=1e-5)
    # differences -20, -20.5, -19.5: t = -20 / (0.5 / √3) = -69.282, p = 1 - 69.282 / √(4800 + 2) = 0.000208
    assert paired_p(spread(*FEDAVG), spread(*FEDMITR)) == pytest.approx(0.000208, abs=1e-6)
    # only seeds that both have are paired
    more = Spread({**dict(enumerate(LDA)), 7: 99.0})
    assert paired_p(more, spread(*FEDMITR)) == paired_p(spread(*LDA), spread(*FEDMITR))
    # it says nothing of one seed, and where the difference is the same for all
    for ours, theirs in [((50.0,), (40.0,)), ((50.0, 60.0), (40.0, 50.0)), ((50.0, 60.0), (50.0, 60.0))]:
        assert paired_p(spread(*ours), spread(*theirs)) is None


def test_marks_are_corrected_by_holm_s_for_the_number_of_tests() -> None:
    """Of one method, three seeds with p = 0.0155; beside three others, four times that is no finding any more."""
    # in order 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which is no less than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    entries = seeds("fedmitr", FEDMITR)
    others = [entry for name in ("fedavg", "krum", "adi", "dense") for entry in seeds(name, (30.0, 30.0, 30.0))]
    for entry in (*entries, *others):
        entry["accuracy"]["local"] = []
    one = markdown(results([*entries, *others[:3]]))
    assert "| `fedavg` | 30.0 ± 0.0 (3) ▼ |" in one
    assert "p < 0.05 after Holm's correction for the number of tests of this table, 1." in one
    assert "▼ |" not in markdown(results([*entries, *others]))


def test_the_accuracy_table() -> None:
    text = markdown(results([*three_methods(), an_entry("ensemble", 90.0)]))
    for line in (
        "### digits, 4 clients, small ViT, 8 px",
        "| Method | Dirichlet 0.1 |",
        "| `lda` | **56.0 ± 7.2 (3)** |",  # p = 0.096: no mark
        "| `fedmitr` | 51.7 ± 4.7 (3) |",  # √((13.44 + 2.78 + 28.44) / 2) = 4.726
        "| `fedavg` | 31.7 ± 5.1 (3) ▼ |",
        "| `ensemble` | 90.0 (1) |",  # for reference: not bold
        "| `clients alone, mean` | 30.0 ± 0.0 (3) ▼ |",
        "| `clients alone, best` | 40.0 ± 0.0 (3) |",
    ):
        assert line in text
    assert text.count("Machine: Abacus, 2 cores. python 3.11.7. Code 0123456789ab.") == 1
    better = markdown(replace(results(three_methods()), reference="fedavg"))
    assert "| `fedmitr` | 51.7 ± 4.7 (3) ▲ |" in better
    assert "worse than `fedavg` in a paired" in better
    assert "worse than" not in markdown(replace(results(three_methods()), reference="adi"))  # which has no row


def test_a_row_of_fewer_seeds_is_marked_by_these_and_is_not_the_best() -> None:
    # On the seeds that both have lda is better, by 2 and 2.02; fedmitr's mean is higher for it has an easy seed more.
    entries = [*seeds("fedmitr", (40.0, 41.0, 80.0)), *seeds("lda", (42.0, 43.02)), an_entry("fedavg", 90.0)]
    text = markdown(results(entries[:-1]))
    assert "| `lda` | 42.5 ± 0.7 (2) ▲ |" in text
    assert "| `fedmitr` | **53.7 ± 22.8 (3)** |" in text
    assert "| `fedavg` | 90.0 (1) |" in markdown(results(entries))


def test_places_are_columns_and_what_is_missing_is_a_dash() -> None:
    entries = [an_entry("fedmitr", 50.0), an_entry("fedmitr", 70.0, partition="IID"), an_entry("fedavg", 60.0)]
    text = markdown(results(entries, [{"label": "fedavg"}, {"label": "adi"}, {"label": "fedavg"}]))
    assert "| Method | Dirichlet 0.1 | IID |" in text
    assert "| `fedmitr` | 50.0 (1) | **70.0 (1)** |" in text
    assert "| `fedavg` | **60.0 (1)** | - |" in text
    assert "Cells without a result: 3 (`fedavg` 2, `adi` 1)." in text


def test_costs_are_means_over_clients_and_rounds_are_named() -> None:
    text = markdown(results([an_entry("fedmitr", 50.0), an_entry("flower:fedadam", 60.0, rounds=5)]))
    assert "| Method | Up, MB | Down, MB | Client, s | Server, s | Peak RAM, GB |" in text  # no GPU anywhere
    assert "| `fedmitr` | 2 | 2 | 10 | 2 | 3 |" in text
    assert "| `flower:fedadam, 5 rounds` | 10 | 10 | 50 | 2 | 3 |" in text
    told = {"bytes_statistics": [100, 300]}  # what methods on statistics are charged for
    found = rows(results([an_entry("lda", 50.0, **told), an_entry("fedmitr", 50.0, **told)]))
    assert [row.cost("bytes_up") for row in found[:2]] == [200.0, 2e6]


def test_the_csv_has_the_numbers_unrounded() -> None:
    lda = {"data": "digits", "clients": "4", "partition": "Dirichlet 0.1", "method": "lda", "rounds": "1"}
    lda |= {"kind": "one-shot", "n": "3", "seeds": "0 1 2", "worst_class_mean": "46", "bytes_up": "2e+06"}
    lda |= {"client_seconds": "10", "peak_gpu": "", "accuracy_mean": "56"}
    by_label = {line["method"]: line for line in csv.DictReader(as_csv(results(three_methods())).splitlines())}
    line = by_label["lda"]
    assert lda.items() <= line.items()
    assert float(line["accuracy_std"]) == pytest.approx(7.2111, abs=1e-4)
    assert float(line["p_against_reference"]) == pytest.approx(0.09643, abs=1e-5)
    assert by_label["fedmitr"]["p_against_reference"] == ""


def test_a_row_has_its_reference_at_its_own_place() -> None:
    found = rows(results([*three_methods(), *three_methods(partition="IID")]))
    for row in found:
        reference = reference_of(found, row.place, "fedmitr")
        assert reference.place == row.place
        assert row.label != "lda" or p_value(row, reference) == pytest.approx(0.09643, abs=1e-5)


def test_all_results_in_one_file_are_read_back_and_others_refused(tmp_path: Path) -> None:
    before = results([*three_methods(), an_entry("flower:krum", 1.0, rounds=5)], [{"label": "adi", "seed": 3}])
    save(before, tmp_path / "results.jsonl")
    assert load(tmp_path / "results.jsonl") == before
    head, *lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert len(lines) == 10
    assert head["common"]["machine"]["cpu"] == "Abacus"
    assert all("machine" not in line and "config" not in line for line in lines)  # what all share stands once
    for content in ("", "no json", "{}", '{"name": "x"}\n{}'):
        (tmp_path / "results.jsonl").write_text(content)
        with pytest.raises(RunError, match=r"cannot read the bench folder or results\.jsonl"):
            load(tmp_path / "results.jsonl")
    with pytest.raises(RunError, match=r"is not a folder of `fedmitr bench`"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="not both"):
        bench(tmp_path, {}, table=tmp_path)


ONE_SHOT = ("fedavg", "adi", "dense", "coboosting", "fedmitr", "lda", "ridge", "fedpft", "ensemble", "feddf", "central")
VARIANTS = ("fedmitr-dense", "fedmitr-pri", "fedmitr-none", "fedmitr-drop")


@pytest.fixture(scope="module")
def many() -> list[Row]:
    """A whole grid: all methods and strategies, four places, two seeds."""
    made = []
    for place, partition in enumerate(PLACES):
        for number, label in enumerate((*ONE_SHOT, *VARIANTS)):
            spent = {"server_seconds": 0.1 * 10 ** (number % 4)}
            made += [an_entry(label, 20.0 + 15 * place + number + seed, seed, partition, **spent) for seed in (0, 1)]
        for number, name in enumerate(STRATEGIES):
            accuracy = 30.0 + 15 * place + number
            made += [an_entry(f"flower:{name}", accuracy, 0, partition, rounds) for rounds in (1, 10)]
    return rows(results(made))


TWO = [an_entry("fedmitr", 50.0), an_entry("fedavg", 30.0)]  # at one place


def drawn(name: str, found: list[Row], title: str = "digits") -> tuple[Figure, RendererBase]:
    """A figure, laid out."""
    figure = recall(found, found[0].place) if name == "recall" else dots(found, "fedmitr", title)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas.get_renderer()  # type: ignore[no-untyped-call]


def marked(axis: Any) -> dict[tuple[float, float], tuple[str, str]]:
    """Of each point where it is, its colour and what it is filled with."""
    lines = [line for line in axis.get_lines() if line.get_marker() == "o"]
    looks = [(to_hex(line.get_color()), to_hex(line.get_markerfacecolor())) for line in lines]
    return {(line.get_xdata()[0], line.get_ydata()[0]): look for line, look in zip(lines, looks, strict=True)}


def test_points_by_hand_each_on_the_line_of_its_method() -> None:
    entries = [an_entry("fedmitr", 50.0, 0), an_entry("fedmitr", 54.0, 1), an_entry("fedavg", 40.0)]
    entries += [an_entry("flower:krum", 30.0, rounds=5), an_entry("flower:krum", 20.0, rounds=1)]
    figure, _ = drawn("dots", rows(results(entries)))
    accuracy, up, _ = figure.axes
    names = ["fedmitr", "fedavg", "flower:krum, 5 rounds", "flower:krum, 1 round"]
    assert [text.get_text() for text in accuracy.get_yticklabels()][:4] == names
    assert list(marked(accuracy))[:4] == [(52.0, 0), (40.0, 1), (30.0, 2), (20.0, 3)]
    (bar,) = accuracy.collections[0].get_segments()
    assert bar[:, 0] == pytest.approx([52 - math.sqrt(8), 52 + math.sqrt(8)])  # (2² + 2²) / 1
    assert list(marked(up)) == [(2.0, 0), (2.0, 1), (10.0, 2), (2.0, 3)]  # in MB; clients alone have none


def test_what_is_ours_stands_out_and_places_are_in_order_of_their_skew(many: list[Row]) -> None:
    figure, _ = drawn("dots", many)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["2 classes", "Dirichlet 0.1", "Dirichlet 0.5", "IID"]
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    looks = {names[int(y)]: look for (_, y), look in marked(figure.axes[0]).items()}
    ours = OURS.lower()
    assert {name for name, (colour, _) in looks.items() if colour == ours} == {"fedmitr", *VARIANTS}
    assert {name for name, (_, filled) in looks.items() if filled == "#ffffff"} == set(VARIANTS)
    assert looks["fedmitr"] == (ours, ours)
    assert len(names) == len(looks) == len(ONE_SHOT) + len(VARIANTS) + 2 * len(STRATEGIES) + 2


def test_nothing_is_on_top_of_anything(many: list[Row]) -> None:
    figure, renderer = drawn("dots", many)
    axes = [axis.get_tightbbox(renderer).padded(-0.5) for axis in figure.axes]
    for number, axis in enumerate(axes):
        assert not any(axis.overlaps(other) for other in axes[:number])
        assert 0 <= axis.x0 <= axis.x1 <= figure.bbox.width
    labels = [text.get_window_extent(renderer) for text in figure.axes[0].get_yticklabels()]
    assert all(not one.overlaps(other) for one, other in pairwise(labels))


@pytest.mark.parametrize("name", ["dots", "recall"])
def test_a_small_picture_holds_its_title(name: str) -> None:
    figure, renderer = drawn(name, rows(results(TWO)), "a data set with a long name, 10 clients")
    box = figure._suptitle.get_window_extent(renderer)  # type: ignore[attr-defined]
    assert 0 <= box.x0 <= box.x1 <= figure.bbox.width


def test_the_heat_map_is_the_recall_a_mean_over_seeds_that_have_the_class() -> None:
    entries = seeds("fedmitr", (50.0, 60.0))
    entries[1]["accuracy"]["per_class"] = {"cat": 40.0, "dog": None}
    assert rows(results(entries))[0].recall == {"cat": 50.0, "dog": 40.0}
    (axis, _) = drawn("recall", rows(results(TWO)))[0].axes
    assert axis.images[0].get_array().tolist() == [[60.0, 40.0], [40.0, 20.0]]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["fedmitr", "fedavg"]
    assert [text.get_text() for text in axis.texts] == ["60", "40", "40", "20"]


def test_all_pictures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(figures, "save", lambda _, path: saved.append(path.name))
    made = [an_entry(label, 50.0, 0, partition) for label in ("fedmitr", "lda") for partition in ("2 classes", "IID")]
    (tmp_path / "digits-K4-recall-dirichlet-0.1.png").write_bytes(b"of an earlier grid")
    assert draw(results(made), tmp_path) == 3
    assert not list(tmp_path.iterdir())
    names = ("accuracy", "recall-2-classes", "recall-iid")
    assert saved == [f"digits-K4-{name}.{kind}" for name in names for kind in ("png", "pdf")]


def test_a_picture_is_the_same_file_each_time(tmp_path: Path) -> None:
    for name in ("a.pdf", "b.pdf", "a.png"):
        figures.save(drawn("recall", rows(results(TWO)))[0], tmp_path / name)
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_for_latex() -> None:
    text = latex(results(three_methods(data="my_data & more")))
    for line in (
        r"\begin{tabular}{lr}",
        r"Method & Dirichlet 0.1 \\",
        r"\texttt{lda} & \textbf{56.0 $\pm$ 7.2 (3)} \\",
        r"\texttt{fedavg} & 31.7 $\pm$ 5.1 (3) $\blacktriangledown$ \\",
        r"\textit{One-shot} &  \\",
    ):
        assert line in text
    assert tabular(["| a_b | 5 % |", "| --- | --- |", "| `c\\d` | - |"])[2:5] == [
        r"a\_b & 5 \% \\",
        r"\midrule",
        r"\texttt{c\textbackslash{}d} & - \\",
    ]
