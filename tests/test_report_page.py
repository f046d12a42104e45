"""report.html: every section, nothing from outside, what is shown is the run's, and names cannot become markup."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import settings

from fedmitr_flwr import cli, pipeline
from fedmitr_flwr.common.errors import RunError
from fedmitr_flwr.common.progress import Series
from fedmitr_flwr.report import charts
from fedmitr_flwr.report.page import write_page
from fedmitr_flwr.runs.folder import RunFolder

SECTIONS = ["accuracy", "partition", "images", "steps", "confusion", "recall", "cost", "config", "origin"]


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.sections: list[str] = []
        self.pictures: dict[str, dict[str, str]] = {}
        self.words: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attributes}
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "section":
            self.sections.append(told["id"])
        if tag == "img":
            self.pictures[self.sections[-1]] = told
        self.links += [value for name, value in told.items() if name in ("src", "href", "srcset", "action", "data")]
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.sections:
            self.words.setdefault(self.sections[-1], []).append(data.strip())


def a_run(folder: Path, **changes: object) -> RunFolder:
    return pipeline.run(settings(**{"out-dir": str(folder)} | changes), "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return a_run(tmp_path_factory.mktemp("page"), **{"distill.rounds": 2})


def test_every_section_is_there_and_nothing_comes_from_outside(run: RunFolder) -> None:
    page = Page(write_page(run.path))
    assert page.sections == SECTIONS
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert "http" not in page.text.replace("http-equiv", "")
    assert "url(" not in page.text
    assert set(page.pictures) == {"accuracy", "partition", "images", "steps", "confusion"}
    for picture in page.pictures.values():
        kind, content = picture["src"].split(";base64,")
        raw = base64.b64decode(content, validate=True)
        assert raw.startswith(b"\x89PNG" if kind == "data:image/png" else b"<?xml")
        assert len(picture["alt"]) > 20


def test_what_it_says_is_the_run_s(run: RunFolder) -> None:
    page, result = Page(write_page(run.path)), run.read_result()
    assert page.text == write_page(run.path).read_text(encoding="utf-8")  # equal runs have equal pages
    assert f"<b>{result['accuracy']['student']:.2f}</b>" in page.text
    assert page.words["recall"][3:23:2] == [f"{number}" for number in range(10)]
    recalls = ["-" if value is None else f"{value:.2f}" for value in result["accuracy"]["per_class"].values()]
    assert page.words["recall"][4:24:2] == recalls
    cost = page.words["cost"]
    assert [cost[place] for place in (6, 10)] == [f"{bytes_ / 1e6:.3f}" for bytes_ in result["bytes_up"]]
    assert f"{result['server_seconds']:.2f}" in cost
    stated = page.words["config"][page.words["config"].index("All settings") + 1 :]
    assert dict(zip(stated[::2], stated[1::2], strict=True)).keys() == result["config"].keys()
    assert result["fingerprint"] in page.words["origin"]
    assert (run.path / "images.png").read_bytes() == base64.b64decode(page.pictures["images"]["src"].split(",")[1])


def test_what_a_run_does_not_have_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path, method="fedavg")
    assert cli.main(["report", str(folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder.path / "report.html")
    page = Page(folder.path / "report.html")
    assert page.sections == SECTIONS
    assert page.words["images"] == ["Synthetic images", "This method made none."]
    assert page.words["steps"][1].startswith("This run told none")
    assert set(page.pictures) == {"accuracy", "partition", "confusion"}

    page = Page(write_page(a_run(tmp_path / "other", method="fedavg", **{"evaluate.where": "clients"}).path))
    assert page.sections == SECTIONS
    assert "images that the clients held out." in " ".join(page.words["accuracy"])
    assert page.words["partition"][1] == "Not known: the clients told no class counts."
    assert page.words["confusion"][1].startswith("Not known")
    assert page.words["recall"][1] == "Not known."

    with pytest.raises(RunError, match=r"has no result\.json"):
        write_page(tmp_path)


def test_an_older_result_and_a_torn_line_of_metrics_do_no_harm(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
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
    assert "steps" in page.pictures
    assert "confusion" not in page.pictures


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
    assert (tmp_path / "partition.png").exists()  # drawn from the counts, since there was none


def test_a_series_is_thinned_evenly_with_both_ends() -> None:
    series = Series()
    for step in range(101):
        series.add(loss=step / 3, alive=1.0)
    assert series.means() == {"loss": pytest.approx(50 / 3), "alive": 1.0}
    thin = series.thin(5)
    assert thin == {"step": [0, 25, 50, 75, 100], "loss": [0.0, 8.333, 16.67, 25.0, 33.33], "alive": [1.0] * 5}
    assert len(series.thin(1000)["step"]) == 101
    assert Series().thin() == {"step": []}


def test_the_curves_are_those_of_the_run(run: RunFolder) -> None:
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    batches = [line for line in lines if line["stage"] == "inversion"]
    assert [len(line["curve"]["loss"]) for line in batches] == [8, 8]  # inversion.steps
    assert batches[0]["curve"]["alive"][:4] == [1.0, 1.0, 0.6875, 0.6875]  # 11 of 16 from step 2 on
    figure = charts.curves(lines)
    assert figure is not None
    loss, alive, parts = figure.axes
    assert [list(line.get_ydata()) for line in loss.get_lines()] == [line["curve"]["loss"] for line in batches]
    assert list(alive.get_lines()[0].get_ydata())[-1] == 100 * 0.4375  # 7 of 16
    steps = list(parts.get_lines()[0].get_xdata())
    assert steps == sorted(set(steps))  # epoch behind epoch


def test_a_batch_that_was_made_twice_is_drawn_once() -> None:
    first, second = ({"step": [0, 1], "loss": [2.0, last]} for last in (1.0, 0.5))
    batch = {"stage": "inversion", "round": 0, "batch": 0}
    figure = charts.curves([{**batch, "curve": first}, {**batch, "curve": second}])
    assert figure is not None
    assert [list(drawn.get_ydata()) for drawn in figure.axes[0].get_lines()] == [[2.0, 0.5]]
    assert charts.curves([{"stage": "upload", "client": 0}]) is None


def test_bars_by_hand() -> None:
    accuracy = {"local": [30.0, None], "fedavg": 20.0, "ensemble": None, "student": 50.0}
    figure = charts.accuracies(accuracy, "adi", ["north", "south"])
    assert figure is not None
    axis = figure.axes[0]
    assert [bar.get_width() for bar in axis.patches] == [50.0, 20.0, 30.0]
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert labels == ["adi: the global model", "one-round FedAvg", "north alone"]
    crowd = charts.accuracies(accuracy | {"local": [float(k) for k in range(40)]}, "adi")
    assert crowd is not None
    assert crowd.axes[0].get_yticklabels()[3].get_text() == "clients alone, mean of 40"
    assert [bar.get_width() for bar in crowd.axes[0].patches][2:] == [0.0, 19.5, 39.0]


def test_the_confusion_matrix_is_shaded_by_row() -> None:
    figure = charts.confusion([[3, 1], [0, 0]], ["cat", "dog"])
    shades = figure.axes[0].images[0].get_array()
    assert shades[0].tolist() == [75.0, 25.0]
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "1", "0", "0"]
