"""Tables of a bench: means, deviations and tests by hand; what is bold, marked, left out; one file of all results."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import an_entry, results

from fedmitr_flwr.bench.command import bench
from fedmitr_flwr.bench.results import load, save
from fedmitr_flwr.bench.rows import p_value, reference_of, rows
from fedmitr_flwr.bench.stats import Spread, holm, paired_p
from fedmitr_flwr.bench.table import as_csv, markdown
from fedmitr_flwr.common.errors import ConfigError, RunError

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
    assert spread(*LDA).mean == 56.0
    assert spread(*LDA).std == pytest.approx(7.2111, abs=1e-4)
    assert (spread(50.0).std, spread(50.0).n) == (None, 1)


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


def test_holm_by_hand() -> None:
    # in order 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which is no less than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_marks_are_corrected_for_the_number_of_tests() -> None:
    """Of one method, three seeds with p = 0.0155; beside three others, four times that is no finding any more."""
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
    by_label = {line["method"]: line for line in csv.DictReader(io.StringIO(as_csv(results(three_methods()))))}
    line = by_label["lda"]
    assert lda.items() <= line.items()
    assert float(line["accuracy_std"]) == pytest.approx(7.2111, abs=1e-4)
    assert float(line["p_against_reference"]) == pytest.approx(0.09643, abs=1e-5)
    assert by_label["fedmitr"]["p_against_reference"] == ""


def test_a_row_has_its_reference_at_its_own_place() -> None:
    found = rows(results([*three_methods(), *three_methods(partition="IID")]))
    pairs = [(row, reference_of(found, row.place, "fedmitr")) for row in found]
    assert all(reference is not None and reference.place == row.place for row, reference in pairs)
    p_values = [p_value(row, reference) for row, reference in pairs if row.label == "lda"]
    assert p_values == [pytest.approx(0.09643, abs=1e-5)] * 2


def test_recall_is_a_mean_over_seeds_that_have_the_class() -> None:
    entries = seeds("fedmitr", (50.0, 60.0))
    entries[1]["accuracy"]["per_class"] = {"cat": 40.0, "dog": None}
    assert rows(results(entries))[0].recall == {"cat": 50.0, "dog": 40.0}


def test_all_results_in_one_file_are_read_back(tmp_path: Path) -> None:
    before = results([*three_methods(), an_entry("flower:krum", 1.0, rounds=5)], [{"label": "adi", "seed": 3}])
    save(before, tmp_path / "results.jsonl")
    after = load(tmp_path / "results.jsonl")
    assert after == before
    assert markdown(after) == markdown(before)
    head, *lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert len(lines) == 10
    assert head["common"]["machine"]["cpu"] == "Abacus"
    assert all("machine" not in line and "config" not in line for line in lines)  # what all share stands once


def test_what_holds_no_results_is_refused(tmp_path: Path) -> None:
    for content in ("", "no json", "{}", '{"name": "x"}\n{}'):
        (tmp_path / "results.jsonl").write_text(content)
        with pytest.raises(RunError, match=r"cannot read the bench folder or results\.jsonl"):
            load(tmp_path / "results.jsonl")
    with pytest.raises(RunError, match=r"is not a folder of `fedmitr bench`"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="give a bench file"):
        bench(None, {})
    with pytest.raises(ConfigError, match="not both"):
        bench(tmp_path, {}, table=tmp_path)
