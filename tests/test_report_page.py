"""report.html and its pictures: all that is shown is the run's, nothing is from outside, overlaps or falls off."""

import base64
import io
import json
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from tiny import draw, settings, small
from torch import Tensor

from fedmitr_flwr import cli, pipeline
from fedmitr_flwr.common.errors import RunError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.progress import Series
from fedmitr_flwr.data.images import prepare
from fedmitr_flwr.report import charts, figures
from fedmitr_flwr.report.figures import _fade, samples, save_images, save_partition
from fedmitr_flwr.report.page import write_page
from fedmitr_flwr.runs.folder import RunFolder

JSON = ("result.json", "metrics.jsonl")
SECTIONS = [
    "accuracy",
    "partition",
    "learning",
    "weights",
    "images",
    "steps",
    "confusion",
    "recall",
    "diagnostics",
    "cost",
    "config",
    "origin",
]


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.sections, self.open, self.links, self.images = (list[str]() for _ in range(4))
        self.pictures, self.words = dict[str, dict[str, str]](), defaultdict[str, list[str]](list)
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        told = {name: value or "" for name, value in attributes}
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "section":
            self.sections.append(told.get("id", ""))
        self.images += [told.get("src", "")] * (tag == "img")
        if tag in ("img", "svg"):
            self.pictures[self.sections[-1]] = told
        self.links += [
            value for name, value in told.items() if name in ("src", "href", "xlink:href", "srcset", "action", "data")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.sections:
            self.words[self.sections[-1]].append(data.strip())


def a_run(folder: Path, **changes: object) -> RunFolder:
    return pipeline.run(settings(**{"out-dir": str(folder)} | changes), "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        draw(patch)
        return a_run(tmp_path_factory.mktemp("page"), **{"distill.rounds": 2})


def test_every_section_is_there_nothing_comes_from_outside_and_what_it_says_is_the_run_s(run: RunFolder) -> None:
    page, result = Page(write_page(run.path)), run.read_result()
    assert page.sections == SECTIONS
    files = {link for link in page.links if link[:1] != "#" and not link.startswith("data:image/png;base64,")}
    assert files == {"model.safetensors", "config.json", "README.md", "pool.safetensors", "config.toml", *JSON}
    assert all((run.path / name).is_file() for name in files)
    assert not re.search(r"http(?!-equiv)|url\((?!#)|#000000", page.text)  # dark text would be lost on a dark page
    drawn = {"accuracy", "partition", "learning", "weights", "steps", "confusion"}
    assert set(page.pictures) == {*drawn, "images"}
    assert all(len(page.pictures[name]["aria-label"]) > 20 for name in drawn)
    assert page.text == write_page(run.path).read_text(encoding="utf-8")  # equal runs have equal pages
    assert f"<b>{result['accuracy']['student']:.2f}</b>" in page.text
    recall = {name: "-" if value is None else f"{value:.2f}" for name, value in result["accuracy"]["per_class"].items()}
    told = dict(zip(page.words["recall"][3:23:2], page.words["recall"][4:24:2], strict=True))
    assert told == recall
    assert list(told.values()) == sorted(recall.values(), key=float)  # from the worst
    cost = page.words["cost"]
    assert [cost[place] for place in (6, 10)] == [f"{bytes_ / 1e6:.3f}" for bytes_ in result["bytes_up"]]
    assert f"{result['server_seconds']:.2f}" in cost
    stated = page.words["config"][page.words["config"].index("All settings") + 1 :]
    assert dict(zip(stated[::2], stated[1::2], strict=True)).keys() == result["config"].keys()
    assert result["fingerprint"] in page.words["origin"]
    pictures = [base64.b64decode(link.split(",")[1]) for link in page.images]
    images, alive = (load_tensors(run.pool_path)[0][name] for name in ("images", "alive"))
    chosen = samples(images, alive, load_tensors(run.pool_path)[0]["targets"], run.config.model, 24)
    assert [imread(io.BytesIO(each)).shape for each in pictures] == [(8, 8, 3)] * 40  # 20 and their masks
    wanted = [np.float32(picture / 255) for _, *both in chosen for picture in both]
    np.testing.assert_allclose([imread(io.BytesIO(each)) for each in pictures], wanted, atol=1e-6)
    assert "fedmitr run" in " ".join(page.words["config"])


def test_what_a_run_does_not_have_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path, method="fedavg")
    assert cli.main(["report", str(folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder.path / "report.html")
    page = Page(folder.path / "report.html")
    assert page.sections == SECTIONS
    assert page.words["images"] == ["Synthetic images", "This method made none."]
    assert page.words["steps"][1].startswith("This run told none")
    assert page.words["learning"][1].startswith("Not known")
    assert page.words["weights"][1].startswith("Not known")
    assert set(page.pictures) == {"accuracy", "partition", "confusion"}
    folder = a_run(tmp_path / "other", method="fedavg", **{"evaluate.where": "clients"})
    page = Page(write_page(folder.path))
    assert page.sections == SECTIONS
    assert "images that the clients held out." in " ".join(page.words["accuracy"])
    assert page.words["partition"][1] == "Not known: the clients told no class counts."
    assert page.words["confusion"][1].startswith("Not known")
    assert page.words["recall"][1] == "Not known."
    folder.result_path.unlink()
    with pytest.raises(RunError, match=r"has no result\.json"):
        write_page(folder.path)


def test_an_older_result_and_a_torn_line_of_metrics_do_no_harm(run: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(run.path, tmp_path / "run"), run.config)
    result = folder.read_result()
    for key in ("confusion", "client_seconds", "server_seconds", "peak_memory", "core"):
        del result[key]
    del result["accuracy"]["worst_class"]
    result["config"]["older.setting"] = 1
    folder.write_result(result)
    lines = folder.metrics_path.read_text().splitlines()
    folder.metrics_path.write_text("\n".join([*lines, lines[0][:20]]))
    page = Page(write_page(folder.path))
    assert page.sections == SECTIONS
    assert ("steps" in page.pictures, "confusion" in page.pictures) == (True, False)


def test_names_cannot_become_markup(run: RunFolder, tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    result = run.read_result()
    recall = result["accuracy"]["per_class"]
    result["accuracy"]["per_class"] = {evil if name == "0" else name: value for name, value in recall.items()}
    result["method"] = result["machine"]["cpu"] = evil
    RunFolder(tmp_path, run.config).write_result(result)
    page = Page(write_page(tmp_path))
    assert "<script" not in page.text
    assert evil in page.words["recall"]
    assert "partition" in page.pictures


def test_a_series_is_thinned_evenly_with_both_ends() -> None:
    series = Series()
    for step in range(101):
        series.add(loss=step / 3, alive=1.0)
    assert series.means() == {"loss": pytest.approx(50 / 3), "alive": 1.0}
    thin = series.thin(5)
    assert thin == {"step": [0, 25, 50, 75, 100], "loss": [0.0, 8.333, 16.67, 25.0, 33.33], "alive": [1.0] * 5}
    assert len(series.thin(1000)["step"]) == 101
    assert Series().thin() == {"step": []}


def test_the_curves_are_those_of_the_run_and_a_batch_that_was_made_twice_is_drawn_once(run: RunFolder) -> None:
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    batches = [line for line in lines if line["stage"] == "inversion"]
    assert [len(line["curve"]["loss"]) for line in batches] == [8, 8]  # inversion.steps
    assert batches[0]["curve"]["alive"][:4] == [1.0, 1.0, 0.6875, 0.6875]  # 11 of 16 from step 2 on
    loss, alive, parts = (figure.axes[0] for figure in charts.curves(lines))
    assert [list(line.get_ydata()) for line in loss.get_lines()] == [line["curve"]["loss"] for line in batches]
    assert list(alive.get_lines()[0].get_ydata())[-1] == 100 * 0.4375  # 7 of 16
    steps = list(parts.get_lines()[0].get_xdata())
    assert steps == sorted(set(steps))  # epoch behind epoch
    batch = {"stage": "inversion", "round": 0, "batch": 0}
    (figure,) = charts.curves([batch | {"curve": {"step": [0, 1], "loss": [2.0, last]}} for last in (1.0, 0.5)])
    assert [list(drawn.get_ydata()) for drawn in figure.axes[0].get_lines()] == [[2.0, 0.5]]
    assert charts.curves([{"stage": "upload", "client": 0}]) == []
    known = {"fedavg": 40.0, "ensemble": None}
    told = [(0, 1, 5.0), (0, 2, 20.0), (0, 2, 30.0), (1, 2, 50.0)]  # an epoch that was done again counts once
    learned = [{"stage": "student", "round": r, "epoch": epoch, "accuracy": percent} for r, epoch, percent in told]
    first, _, second, fedavg = charts.learning(learned, known).axes[0].get_lines()
    assert [list(map(list, line.get_data())) for line in (first, second)] == [[[1, 2], [5, 30]], [[4], [50]]]
    assert fedavg.get_ydata()[0] == 40.0
    assert charts.learning([], known) is None


def words(texts: list[mpl.text.Text]) -> list[str]:
    return [text.get_text() for text in texts]


def test_bars_by_hand_and_a_confusion_matrix_shaded_by_row() -> None:
    accuracy = {"local": [30.0, None], "fedavg": 20.0, "ensemble": None, "student": 50.0}
    axis = charts.accuracies(accuracy, "adi", ["north", "south"]).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [50.0, 20.0, 30.0]
    assert words(axis.get_yticklabels()) == ["adi: global", "one-round FedAvg", "north alone"]
    crowd = charts.accuracies(accuracy | {"local": [float(k) for k in range(40)]}, "adi").axes[0]
    assert crowd.get_yticklabels()[3].get_text() == "clients alone, mean of 40"
    assert [bar.get_width() for bar in crowd.patches][2:] == [0.0, 19.5, 39.0]
    axis = charts.confusion([[3, 1], [0, 0]], ["cat", "dog"]).axes[0]
    assert axis.images[0].get_array()[0].tolist() == [75.0, 25.0]
    assert words(axis.texts) == ["3", "1"]  # of dogs there are none
    axis = charts.weights({"0": [0.25], "1": [0.75], "statistics": [0.0]}, ["cat"], ["north"]).axes[0]
    assert words(axis.get_yticklabels()) == ["north", "1", "statistics"]
    assert words(axis.texts) == ["25", "75", "0"]


def test_a_hundred_classes_are_a_histogram_and_the_worst_ten_and_names_are_thinned(
    run: RunFolder, tmp_path: Path
) -> None:
    result = run.read_result()
    names = [f"class {number}" for number in range(100)]
    result["accuracy"]["per_class"] = {name: float(number) for number, name in enumerate(names)}
    result["confusion"] = torch.eye(100, dtype=torch.int64).tolist()
    result["counts"], result["teacher_weights"] = [[1] * 100] * 2, {"0": [0.5] * 100, "1": [0.5] * 100}
    RunFolder(tmp_path, run.config).write_result(result)
    told = Page(write_page(tmp_path)).words["recall"]
    worst = told.index("Class") + 2
    assert told[worst : worst + 20 : 2] == names[:10]
    assert told[worst + 20] == "All classes"
    axis = charts.confusion(result["confusion"], names).axes[0]
    assert words(axis.get_xticklabels()) == words(axis.get_yticklabels()) == names[::4]
    assert [bar.get_height() for bar in charts.recalls([0.0, 4.0, 52.0]).axes[0].patches][:11] == [2, *[0] * 9, 1]


def test_runs_and_their_fusions_are_compared(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, folder = run.read_result(), RunFolder(tmp_path / "first", run.config)
    parts = {"student": 61.5, "fedavg": 20.25, "ensemble": None}
    folder.sub("lda").write_result(result | {"accuracy": result["accuracy"] | parts, "calibration": None})
    assert cli.main(["compare", str(folder.path), str(run.path)]) == 0
    text, path = capsys.readouterr().out.strip().split("\n\n")
    _, lda, own = text.splitlines()
    assert lda.split()[:7] == ["first/lda-1", "fedmitr", "61.50", "20.25", "+41.25", "-", own.split()[6]]
    assert own.split()[7:9] == [f"{result['calibration']['nll']:.3f}", f"{result['calibration']['ece']:.2f}"]
    page = Page(Path(path))
    assert Path(path) == folder.path / "compare.html"
    assert "#000000" not in page.text
    assert "61.50" in page.words[""]
    assert "None." in page.words[""]  # their settings are alike
    found = {"a": {"accuracy": parts}, "b": {"accuracy": parts | {"student": 70.0}}}
    fedavg, student = charts.runs(found).axes[0].get_lines()
    assert [list(line.get_xdata()) for line in (fedavg, student)] == [[20.25, 20.25], [61.5, 70.0]]
    assert cli.main(["compare", str(tmp_path)]) == 2


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    saved, save = list[Figure](), figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


def some_images(count: int, channels: int, size: int, grid: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, channels, size, size), generator=rng, dtype=torch.uint8)
    return prepare(pixels, small(size, channels)), torch.rand(count, grid**2, generator=rng) < 0.6


def outside(figure: Figure) -> list[str]:
    figure.draw_without_rendering()  # places everything anew: saving used another resolution
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width, height = figure.bbox.size
    texts = list(figure.texts)
    for axis in figure.axes:
        shown = axis.axison and axis.get_label() != "<colorbar>"  # whose ticks beyond its ends are not drawn
        texts += [axis.title, *(axis.findobj(mpl.text.Text) if shown else [])]
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


@pytest.mark.parametrize(("count", "channels", "size", "grid"), [(1, 1, 8, 4), (7, 3, 96, 6), (60, 1, 8, 4)])
def test_images(tmp_path: Path, drawn: list[Figure], channels: int, size: int, grid: int, count: int) -> None:
    images, alive = some_images(count, channels, size, grid)
    classes = [f"class_with_long_name_{label}" for label in range(10)]
    targets = torch.arange(count) * 7 % 10
    save_images(images, alive, targets, classes, small(size, channels), tmp_path / "images.png")
    picture = imread(tmp_path / "images.png")
    assert picture.shape[0] > 100
    assert np.ptp(picture[..., :3]) > 0.5  # not blank
    (figure,) = drawn
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert sorted(titles) == [""] * min(count, 30) + ["class_with_long…"] * min(count, 30)  # with masks below
    assert f"{min(count, 30)} of {count} synthetic images" in figure.get_suptitle()
    assert f"{100 * alive.float().mean().item():.0f} % of all patches alive" in figure.get_suptitle()
    assert outside(figure) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["images.png"]


def test_the_chosen_images_cover_all_classes_and_stand_under_their_names(tmp_path: Path, drawn: list[Figure]) -> None:
    targets = torch.arange(200) % 10
    pixels = (targets * 20).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)  # the colour tells the class
    alive = torch.ones(200, 16, dtype=torch.bool)
    save_images(prepare(pixels, small()), alive, targets, [*map(str, range(10))], small(), tmp_path / "i.png")
    titled = [axis for axis in drawn[0].axes if axis.get_title()]
    titles = [axis.get_title() for axis in titled]
    assert titles == sorted(titles)
    assert all(titles.count(str(label)) == 3 for label in range(10))
    for axis in titled:
        assert axis.images[0].get_array()[0, 0].tolist() == [20 * int(axis.get_title())] * 3


@pytest.mark.parametrize(
    ("clients", "width", "name"), [(2, 10, "{}"), (20, 10, "automobile_{}"), (2, 100, "aquarium_fish_{}")]
)
def test_partition(tmp_path: Path, drawn: list[Figure], clients: int, width: int, name: str) -> None:
    counts = torch.randint(0, 600, (clients, width), generator=torch.Generator().manual_seed(1))
    save_partition(counts, [name.format(label) for label in range(width)], tmp_path / "partition.png")
    (figure,) = drawn
    axis = figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("class", "client")
    assert words(axis.get_xticklabels())[3] == name.format(3 if width == 10 else 12)  # each fourth of 100
    assert words(axis.get_yticklabels()) == [f"{client} (n = {of.sum()})" for client, of in enumerate(counts)]
    assert words(axis.texts) == ([str(count) for count in counts.flatten().tolist()] if width == 10 else [])
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


def test_pyplot_is_never_used() -> None:
    sources = Path(figures.__file__).parents[1].rglob("*.py")
    assert not [path for path in sources if re.search(r"import\b.*pyplot", path.read_text(encoding="utf-8"))]
