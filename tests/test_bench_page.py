"""The page and the tables say what the records say."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rgft.bench.ablations import with_tables
from rgft.bench.areas import areas
from rgft.bench.beyond_headline import calibration, other_domains, perplexity
from rgft.bench.journal import FILE, read_cells, read_records
from rgft.bench.page import load, markdown, render
from rgft.bench.results import costs_to_target, judged_on, results
from rgft.bench.running import told
from rgft.bench.table import spread
from rgft.bench.tables import against_full, leaderboard, lever_table, ours_against, runs, targets
from rgft.errors import InputError
from rgft.extensions import extend

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "records" / "comparison.jsonl"


def record(arm: str, seed: int, score: float, **changed: Any) -> dict[str, Any]:
    values = {"accuracy": score}
    return {
        **{"status": "finished", "task": "t", "model": "m", "arm": arm, "seed": seed},
        **{"budget": 0.5, "rate": 1e-4, "rows": {"train": 9}, "epochs": 1.0},
        **{"metric": "accuracy", "metrics": {"validation": values, "test": values}},
        **{"flops": {"spent": 5.0, "full": 10.0, "share": 0.5}, "seconds": {"train": 2.0}},
        **{"key": f"{arm} {seed} {changed}", "extends": None},
        **changed,
    }


def test_pages_are_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("tables")
    for path in tables.pages():
        text = path.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{path.name}: run python benchmarks/tables.py"
    assert "| trec | 1 | full |" in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_a_page_may_have_every_ablation_of_several_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def scores(validation: float, test: float) -> dict[str, Any]:
        return {"validation": {"accuracy": validation}, "test": {"accuracy": test}}

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("tables")
    config = {"beta": 0.9, "p": None, "every": 5}
    own = {"config": config}
    files = {
        "x": [
            *(record("rgft", s, 0, metrics=scores(0.7, 0.5 + s / 10), **own) for s in (0, 1)),
            *(ablated("beta", 0, s, 0, metrics=scores(0.8, 0.4 + s / 5)) for s in (0, 1)),
        ],
        "y": [ablated("p", 1, 0, 0, metrics=scores(0.9, 0.6)), ablated("every", 5, 0, 0.5)],
    }
    for name, records in files.items():
        text = "".join(json.dumps(one) + "\n" for one in records)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    paths = " ".join(str(tmp_path / f"{name}.jsonl") for name in files)
    text = tables.filled(f"<!-- records: {paths} ablations -->\n<!-- /records -->")
    head = "| budget | change | arm | t, validation | t, test | difference | 95% interval | pairs |"
    assert text.splitlines()[1:-1] == [
        head,
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 0.5 | - | rgft | 70.0 ± 0.0 | 55.0 ± 7.1 | - | - | - |",
        "| 0.5 | beta 0.9 → 0 | beta-0 | 80.0 ± 0.0 | 50.0 ± 14.1 | -5.0 | [-10.0, +0.0] | 2 |",
        "| 0.5 | p → 1 | p-1 | 90.0 | 60.0 | +10.0 | - | 1 |",
        "| 0.5 | every → 5 | every-5 | 50.0 | 50.0 | +0.0 | - | 1 |",
    ]
    assert tables.filled(text) == text


def test_runs_in_which_the_method_did_nothing_are_marked() -> None:
    records = [record("full", seed, 0.5, idle=False) for seed in (0, 1)]
    records += [record("top", seed, 0.5, extends="full", idle=True) for seed in (0, 1)]
    records += [record("some", seed, 0.5, extends="full", idle=seed == 1) for seed in (0, 1)]
    found = results(records)
    assert {row[1]: row[2] for row in leaderboard(found).rows} == {
        "full": "50.0 ± 0.0",
        "top": "50.0 ± 0.0 (idle)",
        "some": "50.0 ± 0.0 (1 idle)",
    }
    assert [row[1] for row in lever_table(found).rows] == ["top (idle)", "some (idle)"]
    tables = (
        leaderboard(found),
        against_full(found),
        lever_table(found),
        runs(found),
    )
    assert all("before the method's first decision" in table.caption for table in tables)
    assert "idle" not in markdown([record("full", 0, 0.5)])


def test_means_are_those_of_the_chosen_rate() -> None:
    lines = [r for r in read_records(RECORDS) if (r["task"], r["arm"]) == ("trec", "full")]
    at_first = {r["rate"]: r["metrics"]["validation"]["accuracy"] for r in lines if r["seed"] == 0}
    best = max(at_first, key=lambda rate: at_first[rate])
    scores = [100 * r["metrics"]["test"]["accuracy"] for r in lines if r["rate"] == best]
    told = next(row for row in leaderboard(results(read_records(RECORDS))).rows if row[1] == "full")
    wanted = f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"
    assert wanted in told


def test_differences_are_paired_by_seed() -> None:
    ours, theirs = (0.9, 0.5, 0.7), (0.8, 0.4, 0.6)
    records = [record("full", seed, score) for seed, score in enumerate(theirs)]
    records += [record("x", seed, score) for seed, score in enumerate(ours)]
    for one in records:
        higher = 0.1 * (one["arm"] == "x") * (one["seed"] + 1)
        one["metrics"] = {**one["metrics"], "validation": {"accuracy": 0.5 + higher}}
    (row,) = against_full(results(records)).rows
    assert row[:4] == ["0.5", "x", "full", "+10.0"]
    assert row[4] == "[+10.0, +10.0]" and row[-2] == "too few" and row[5] == "0.25"
    assert row[-1] == "+20.0 [+10.0, +30.0]"
    six = [
        record(arm, s, 0.5 + s / 100 + (arm == "x") / 10) for arm in ("full", "x") for s in range(6)
    ]
    (row,) = against_full(results(six)).rows
    assert row[-2] == "better" and row[5] == "0.0312"
    twice = six + [{**one, "arm": "y", "key": f"y{one['seed']}"} for one in six[6:]]
    assert [row[-3:-1] for row in against_full(results(twice)).rows] == [["6", "unsure"]] * 2
    assert ours_against(results(records)).rows == []
    records += [record("rgft", seed, score + 0.2) for seed, score in enumerate(theirs)]
    rows = ours_against(results(records)).rows
    assert [row[1:4] for row in rows] == [["rgft", "full", "+20.0"], ["rgft", "x", "+10.0"]]


def test_target_is_99_percent_of_the_best_of_full() -> None:
    records = [
        record("full", 0, 0.8),
        record("full", 0, 0.9, budget=1.0, flops={"spent": 10.0, "full": 10.0, "share": 1.0}),
        record("x", 0, 0.892, flops={"spent": 3.0, "full": 10.0, "share": 0.3}),
        record("y", 0, 0.89, flops={"spent": 1.0, "full": 10.0, "share": 0.1}),
    ]
    costs = costs_to_target(results(records), "flops")["t"]
    assert costs == {"full": 10.0, "x": 3.0, "y": float("inf")}
    shown = targets(results(records)).rows
    assert [row[:5] for row in shown] == [
        ["t", "89.1", "full", "10 FLOP", "3.33"],
        ["t", "89.1", "x", "3 FLOP", "0.30"],
        ["t", "89.1", "y", "not reached", "-"],
    ]
    assert markdown(records, "mine").startswith("# mine\n\n")


def test_what_is_no_better_than_chance_is_marked_and_sets_no_target() -> None:
    rows = {"rows": {"train": 9, "validation": 900, "test": 9}}
    known = {"chance": {"test": {"value": 0.5, "rows": 900}}, **rows}
    records = [record("full", seed, 0.5, **known) for seed in (0, 1)]
    records += [record("x", 0, 0.53, **rows), record("y", 0, 0.54, **known)]
    found = results(records)
    assert {row[1]: row[2] for row in leaderboard(found).rows} == {
        "full": "50.0 ± 0.0 (chance)",
        "x": "53.0 (chance)",
        "y": "54.0",
    }
    assert "ignores its input" in leaderboard(found).caption
    assert "ignores its input" not in against_full(found).caption
    assert costs_to_target(found, "flops") == {} and targets(found).rows == []
    validation = {row[2]: row[6] for row in runs(found).rows}
    assert validation == {"full": "50.0 ± 0.0", "x": "53.0", "y": "54.0"}
    lost = {"budget": 0.1, "metrics": {"validation": {"accuracy": 0.9}, "test": {"accuracy": None}}}
    (nan, *_) = results([record("full", 0, 0, **lost, **known), record("full", 0, 0.9, **known)])
    assert not nan.at_chance() and spread(nan) == "-"
    pair = [record("z", 0, 0.9, **known), record("z", 1, 0.5, **known)]
    assert [spread(one) for one in results(pair)] == ["70.0 ± 28.3 (1 chance)"]
    whole = [record("full", 0, 0, **lost, **known), record("full", 0, 0.9, **known)]
    for order in (whole, whole[::-1]):
        assert costs_to_target(results(order), "flops")["t"]["full"] == 5.0
        assert [row[:3] for row in targets(results(order)).rows] == [["t", "89.1", "full"]]


@pytest.mark.parametrize(
    ("metric", "told", "score", "marked"),
    [
        ("accuracy", None, 0.1, False),
        ("accuracy", {"value": None, "rows": 900}, 0.1, False),
        ("rougeL", {"value": None, "rows": 900}, 0.0, False),
        ("f1_macro", {"value": 0.3, "rows": 900}, 0.1, False),
        ("exact_match", {"value": 0.1, "rows": 100}, 0.15, True),
        ("exact_match", {"value": 0.1, "rows": 100}, 0.17, False),
        ("matthews_correlation", None, 0.066, True),
        ("matthews_correlation", None, 0.067, False),
        ("pearson", None, 0.066, True),
    ],
)
def test_chance_is_told_as_far_as_it_and_its_error_are_known(
    metric: str, told: dict[str, Any] | None, score: float, marked: bool
) -> None:
    split = {metric: score, "loss": 1.0}
    metrics = {"validation": split, "test": split}
    of = {} if told is None else {"chance": {"test": told}}
    rows = {"train": 9, "validation": 900, "test": 900}
    (one,) = results([record("x", 0, 0, metric=metric, metrics=metrics, rows=rows, **of)])
    assert one.at_chance() == marked and one.at_chance("test") == marked
    assert one.at_chance("validation") == (marked and told is None)


def test_rates_of_what_writes_are_chosen_by_loss() -> None:
    def at(rate: float, score: float, loss: float | None) -> dict[str, Any]:
        split = {"rougeL": score, "loss": loss, "perplexity": loss and 2 * loss}
        metrics = {"validation": split, "test": split}
        return record("x", 0, 0, rate=rate, metric="rougeL", metrics=metrics)

    (one,) = results([at(1e-4, 0.9, 2.5), at(2e-4, 0.1, 2.4), at(4e-4, 0.5, None)])
    assert one.rate == 2e-4 and one.mean == 0.1
    (one,) = results([at(1e-4, 0.9, None), at(2e-4, 0.1, None)])
    assert one.rate == 1e-4


def test_a_cell_that_went_on_is_told_of() -> None:
    finished = record("x", 0, 0.5)
    assert "went on" not in told(finished)
    assert "went on" not in told({**finished, "resumed": [{"step": 0}]})
    assert told({**finished, "resumed": [{"step": 0}, {"step": 9}]}).endswith("from a checkpoint")


def ablated(option: str, value: Any, seed: int, score: float, **changed: Any) -> dict[str, Any]:
    changes = {"settings": {option: value}}
    return record(f"{option}-{value}", seed, score, extends="rgft", changes=changes, **changed)


def test_the_still_pictures_show_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = importlib.import_module("pictures")
    runs = [record("rgft", s, 0.5, task=task) for s in (0, 1, 2) for task in ("t", "u")]
    runs += [ablated("beta", 0, s, 0.3 + s * s / 10, task="t") for s in (0, 1, 2)]
    runs += [ablated("p", 1, s, 0.6 + s / 10, task="u") for s in (0, 1)]
    first, second = pictures.forest(results(runs)).axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["beta-0", "p-1"]
    assert [axes.get_title() for axes in (first, second)] == ["t", "u"]
    drawn = ((first, 0, [-20, -10, 20], -10 / 3), (second, 1, [10, 20], 15))
    for axes, row, differences, mean in drawn:
        bar, seeds, dot, _ = axes.lines
        assert list(bar.get_xdata()) == pytest.approx([differences[0], differences[-1]])
        assert sorted(seeds.get_xdata()) == pytest.approx(differences)
        assert [*dot.get_xdata(), *dot.get_ydata()] == pytest.approx([mean, row])


def test_quality_over_flops_as_a_still_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = importlib.import_module("pictures")

    def at(arm: str, share: float, seed: int, score: float) -> dict[str, Any]:
        flops = {"spent": 10 * share, "full": 10.0, "share": share}
        return record(arm, seed, score, budget=share, flops=flops)

    runs = [at("rgft", 0.3, s, 0.6 + s / 10) for s in (0, 1)]
    runs += [at("rgft", 0.1, 0, 0.5), at("lora", 0.3, 0, 0.4)]
    figure = pictures.quality_over_flops(results(runs))
    (axes,) = figure.axes
    line, *seeds = axes.lines[:3]
    assert list(line.get_xdata()) == [0.1, 0.3]
    assert list(line.get_ydata()) == pytest.approx([50, 65])
    assert [list(dots.get_ydata()) for dots in seeds] == [[50], pytest.approx([60, 70])]
    cross = axes.lines[-1]
    assert [*cross.get_xdata(), *cross.get_ydata()] == pytest.approx([0.3, 40])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "rgft", "full-tuned", "full-tuned-16", "full", "other arms",
    ]  # fmt: skip


def test_the_still_pictures_are_of_the_records_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = importlib.import_module("pictures")
    for name, (_, files) in pictures.PICTURES.items():
        with Image.open(pictures.ASSETS / name) as image:
            drawn_of = image.info[pictures.RECORDS_OF]
        assert drawn_of == pictures.digest(files), f"{name}: run python benchmarks/pictures.py"


def test_an_ablation_has_every_value_in_order_and_the_base_among_them() -> None:
    records = [record("rgft", s, 0.5 + s / 10, config={"beta": 0.9, "p": 2}) for s in (0, 1)]
    records += [ablated("beta", 0.99, s, 0.6 + s / 10) for s in (0, 1)]
    records += [ablated("beta", 0, s, 0.3 + s / 5) for s in (0, 1)]
    records += [ablated("p", "inf", 0, 0.5)]
    several = {"extends": "rgft", "changes": {"batch_size": 8, "dropout": False}}
    records += [record("other", 0, 0.5, **several)]
    beta, p = (table for _, table in with_tables(results(records)))
    assert beta.title == "beta, from rgft at budget 0.5"
    assert [row[:2] for row in beta.rows] == [
        ["0", "beta-0"],
        ["0.9", "rgft"],
        ["0.99", "beta-0.99"],
    ]
    assert [row[3:] for row in beta.rows] == [
        ["-15.0", "[-20.0, -10.0]"], ["-", "-"], ["+10.0", "[+10.0, +10.0]"],
    ]  # fmt: skip
    assert [row[0] for row in p.rows] == ["2", "inf"]
    page = render(records, "ablations")
    assert page.count("Ablation: ") == 2
    assert "| 0.5 | beta 0.9 → 0 | beta-0 | " in markdown(records).split("## Ablations\n")[1]


def test_values_of_an_ablation_may_be_lists() -> None:
    changes = {"text_columns": ["premise", "question"]}
    records = [record("full", 0, 0.5)]
    records += [record("pairs", s, 0.7, extends="full", changes=changes) for s in (0, 1)]
    ((_, one),) = with_tables(results(records))
    assert [row[:2] for row in one.rows] == [
        ["as in full", "full"], ["['premise', 'question']", "pairs"],
    ]  # fmt: skip
    assert "premise" in render(records, "lists")


def test_what_the_base_has_is_said_only_where_records_say_it() -> None:
    records = [record("rgft", 0, 0.5), ablated("beta", 0, 0, 0.4)]
    ((_, one),) = with_tables(results(records))
    assert [row[0] for row in one.rows] == ["as in rgft", "0"]
    for other, said in ((8, "8"), (16, "as in rgft")):  # a survey may choose by task
        records = [record("rgft", 0, 0.5, batch_size=8)]
        records += [record("rgft", 0, 0.5, batch_size=other, task="u", key="u")]
        records += [record("large", 0, 0.5, extends="rgft", changes={"batch_size": 32})]
        ((_, one),) = with_tables(results(records))
        assert [row[0] for row in one.rows] == [said, "32"]


def test_areas_are_by_seed_and_up_to_the_dearest_run() -> None:
    def at(arm: str, seed: int, score: float, spent: float) -> dict[str, Any]:
        flops = {"spent": spent, "full": 10.0, "share": spent / 10}
        seconds = {"train": 99.0, "processor": 2 * spent}
        return record(arm, seed, score, budget=spent / 10, flops=flops, seconds=seconds)

    records = [at("full", 0, 0.8, 5.0), at("full", 0, 0.9, 10.0), at("x", 0, 0.6, 1.0)]
    records += [at("x", 1, 0.8, 1.0), at("x", 0, 0.7, 2.0), at("x", 1, 0.5, 2.0)]
    full, x = sorted(areas(results(records)).rows, key=lambda row: row[1])
    assert full[1:] == ["full", "0.5, 1", "40.0", "40.0"]
    # seed 0: 0.6 from 1 to 2, 0.7 from 2 to 10; seed 1: 0.8 from 1 to 10, as 0.5 is no better
    assert x[1:4] == ["x", "0.1, 0.2", "67.0 ± 7.1"] and x[4] == x[3]


def test_seconds_are_the_processors_where_all_of_a_task_have_them() -> None:
    both, wall = {"train": 99.0, "processor": 20.0}, {"train": 50.0}
    records = [record("full", 0, 0.9, seconds=both), record("x", 0, 0.9, seconds=both)]
    assert [row[-1] for row in runs(results(records)).rows] == ["20 s", "20 s"]
    records += [record("y", 0, 0.9, seconds=wall)]
    told = {row[2]: row[-1] for row in runs(results(records)).rows}
    assert told == {"full": "1 min 39 s", "x": "1 min 39 s", "y": "50 s"}
    for without in range(3):
        of = [record("z", s, 0.9, seconds=wall if s == without else both) for s in range(3)]
        assert [row[-1] for row in runs(results(of)).rows] == ["1 min 39 s"]


def test_seconds_are_medians_which_a_pause_changes_little() -> None:
    paused = {"train": 9.0, "processor": 7.0, "prepare": 1991.0}
    seconds = [{"train": 2.0, "processor": 1.0, "prepare": 1.0}, paused, {**paused, "prepare": 1.0}]
    (one,) = results([record("x", seed, 0.9, seconds=of) for seed, of in enumerate(seconds)])
    assert one.seconds == 10.0 and one.processor == 8.0


def test_two_editions_of_data_are_kept_apart() -> None:
    records = [
        record("x", 0, 0.5),
        record("x", 0, 0.7, data="ab12"),
        record("x", 1, 0.9, data="ab12"),
    ]
    found = results(records)
    assert [one.mean for one in found] == [0.5, pytest.approx(0.8)]
    assert list(leaderboard(found).header)[2:4] == ["t, other data", "t, data ab12"]
    assert list(leaderboard(found[1:]).header)[2:3] == ["t"]
    editions = [record("x", s, 0.5, extensions=[name]) for s, name in enumerate(("old", "new"))]
    assert "some of these runs have --extend new, --extend old" in markdown(editions)


def test_other_domains_and_calibration_are_shown_where_recorded() -> None:
    own = {"accuracy": 0.9, "calibration_error": 0.05, "loss": 0.3}
    metrics = {"validation": own, "test": own, "tweets": {"accuracy": 0.7}}
    found = results([record("full", 0, 0.9, metrics=metrics), record("x", 0, 0.5)])
    domains = other_domains(found)
    assert list(domains.header) == [
        "task",
        "budget",
        "arm",
        "own domain (test split)",
        "tweets",
    ]
    assert [list(row) for row in domains.rows] == [["t", "0.5", "full", "90.0", "70.0"]]
    written = {"test": {"rougeL": 0.3, "perplexity": 12.0}}
    written["validation"] = {"rougeL": 0.3, "loss": 2.0}
    writes = results(
        [record("full", 0, 0.3, metrics=written, metric="rougeL"), record("x", 0, 0.5)]
    )
    assert [list(row) for row in perplexity(writes).rows] == [["0.5", "full", "12.0"]]
    told = calibration(found)
    assert list(told.header) == ["budget", "arm", "t"]
    assert [list(row) for row in told.rows] == [["0.5", "full", "5.0 (0.300)"]]


def test_preparing_is_counted_in_processor_seconds_where_they_are_known() -> None:
    seconds = {"train": 9.0, "processor": 5.0, "prepare": 3.0}
    (older,) = results([record("full", 0, 0.9, seconds=seconds)])
    (newer,) = results([record("full", 0, 0.9, seconds={**seconds, "prepare_processor": 2.0})])
    assert (older.processor, newer.processor) == (8.0, 7.0)


def test_what_runs_warned_of_is_told_with_their_number() -> None:
    records = [record("full", seed, 0.5, notes=["<too> short"]) for seed in (0, 1)]
    assert "| t | full at 0.5 | 2 | <too> short |" in markdown(records)
    assert "&lt;too&gt; short" in render(records, "a title")
    assert "## Notes" not in markdown([record("full", 0, 0.5, notes=[])])


def test_the_page_is_whole_and_reaches_out_to_nothing() -> None:
    records = [
        *read_records(RECORDS),
        record("<b>&x", 0, 0.5),
        {**record("full", 9, 0.1), "status": "failed", "reason": "</script><i>no</i>"},
    ]
    page = render(records, "a <title>")
    assert "&lt;b&gt;&amp;x" in page and "<b>&x" not in page and "</script><i>" not in page
    assert "1 of the cells failed" in page and "&lt;/script&gt;" in page
    body = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", body) == []
    assert page.count('<script type="application/json">') >= 2
    written = markdown(records)
    assert "## Leaderboard" in written
    assert "## Failed cells" in written and "</script><i>no</i>" in written


def test_what_holds_no_records_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no records"):
        load([tmp_path])
    (tmp_path / "x.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(InputError, match="has a record without 'status'"):
        load([tmp_path / "x.jsonl"])


def test_runs_of_several_recipes_under_one_name_are_told_of() -> None:
    command = "rgft train --task t --seed {} --lr 1e-4 --budget 0.5"
    alike = [record("full", s, 0.5, command=command.format(s)) for s in (0, 1)]
    assert "## Notes" not in markdown(alike)
    other = record("full", 2, 0.5, command=f"{command.format(2)} --batch-size 8")
    said = "| t | full at 0.5 | 3 | some of these runs have --batch-size 8, and others not |"
    assert said in markdown([*alike, other])


def test_a_line_that_is_no_record_of_a_cell_is_refused(tmp_path: Path) -> None:
    whole = json.dumps(next(iter(read_records(RECORDS))))
    (tmp_path / FILE).write_text(f'{whole}\n{{"a": 1}}\n')
    with pytest.raises(InputError, match="a record without 'key'"):
        load([tmp_path])
    with pytest.raises(InputError, match="line 2 has no 'key'; remove the line"):
        read_cells(tmp_path / FILE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "neither METHODS nor TASKS"),
        ("METHODS = [1]", "no dict from names to Method"),
        ("METHODS = {'a': 1}", "METHODS has int under 'a'; make it a Method"),
        ("import rgft\nMETHODS = {'full': rgft.METHODS['full']}", "'full', which is there already"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_file_that_extends_nothing_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        extend((str(path),))
    with pytest.raises(InputError, match="is no file"):
        extend((str(tmp_path / "none.py"),))


@pytest.mark.parametrize("lost", ["metrics", "flops", "seed", "rate"])
def test_a_record_that_lacks_something_is_refused(tmp_path: Path, lost: str) -> None:
    whole = next(iter(read_records(RECORDS)))
    (tmp_path / "r.jsonl").write_text(json.dumps({k: whole[k] for k in whole if k != lost}) + "\n")
    with pytest.raises(InputError, match=f"a record without '{lost}'"):
        load([tmp_path / "r.jsonl"])
    failed = {k: whole[k] for k in ("key", "arm", "task", "budget", "rate")}
    (tmp_path / "r.jsonl").write_text(json.dumps({**failed, "status": "failed"}) + "\n")
    assert len(load([tmp_path / "r.jsonl"])) == 1


def test_each_task_is_judged_by_its_test_split_if_it_has_one() -> None:
    records = [record(arm, seed, 0.5 + seed / 10) for arm in ("full", "x") for seed in (0, 1)]
    other = [
        {**one, "task": "u", "key": f"u{one['key']}", "metrics": {"validation": {"accuracy": 0.9}}}
        for one in records
    ]
    found = results([*records, *other])
    assert {(r.problem.task, r.split) for r in found} == {("t", "test"), ("u", "validation")}
    assert leaderboard(found).rows[0][2:5] == ["55.0 ± 7.1", "90.0 ± 0.0", "72.5"]
    assert judged_on(found) == "test split, of u validation"
    assert judged_on([r for r in found if r.problem.task == "t"]) == "test split"
    lost = {**records[0], "rate": 9.0, "key": "lost"}
    lost["metrics"] = {"validation": {"accuracy": None}, "test": {"accuracy": None}}  # diverged
    assert {r.split for r in results([*records, lost])} == {"test"}
    # an arm without it takes the task to validation, for all alike
    (*_, last) = records
    bare = {**last, "metrics": {"validation": last["metrics"]["validation"]}}
    assert {r.split for r in results([*records[:-1], bare])} == {"validation"}
