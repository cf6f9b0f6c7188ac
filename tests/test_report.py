"""Reports of synthetic runs: what they say, that they are safe, offline, and small enough."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from matplotlib.image import imread
from plotly.offline import get_plotlyjs

from rgft import records
from rgft.components import Component
from rgft.error_map import ErrorMap
from rgft.errors import InputError
from rgft.report import load_run, write_report
from rgft.report.figures import (
    error_map_figure,
    lr_scale_figure,
    quality_figure,
    ranking_figure,
)
from rgft.report.page import render_page
from rgft.report.png import error_map_png

FIGURES = (error_map_figure, lr_scale_figure, quality_figure, ranking_figure)
MAP_FIGURES = (error_map_figure, lr_scale_figure, ranking_figure)


def transformer_parts(layers):
    """(name, kind, depth, numel) in forward order, like a small BERT's."""
    parts = [("embeddings", "embedding", 0, 11_900_000)]
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        parts += [
            (f"{name}.attention", "attention", layer + 1, 591_360),
            (f"{name}.feed_forward", "feed_forward", layer + 1, 1_182_336),
        ]
    return [*parts, ("classifier", "head", layers + 1, 2_306)]


def error_map_table(parts, steps, seed=0):
    """An EMA of noisy scores; low blocks dominate, the trained third changes every 50 steps."""
    rng = np.random.default_rng(seed)
    count = len(parts)
    profile = np.linspace(4.0, 0.4, count) * rng.uniform(0.6, 1.6, count)
    profile[0] *= 6
    error, rows = np.zeros(count), []
    lr_scale = np.ones(count)
    for step in range(1, steps + 1):
        observed = lr_scale > 0
        score = profile * (0.2 + np.exp(-2.5 * step / steps)) * rng.lognormal(0, 0.25, count)
        score = np.where(observed, score, np.nan)
        error = np.where(observed, 0.9 * error + 0.1 * np.nan_to_num(score), error)
        if step % 50 == 0:
            keep = np.argsort(-error * rng.lognormal(0, 0.6, count))[: max(1, count // 3)]
            lr_scale = np.where(np.isin(np.arange(count), [*keep, count - 1]), 1.0, 0.0)
            lr_scale *= 1 + error / error.max()
        rows += [
            (step, name, kind, depth, score[k], error[k], lr_scale[k])
            for k, (name, kind, depth, _) in enumerate(parts)
        ]
    return to_table(rows)


def to_table(rows):
    columns = ["step", "component", "kind", "depth", "score", "error", "lr_scale"]
    types = {"step": "int64", "depth": "int32", "component": "category", "kind": "category"}
    types |= dict.fromkeys(("score", "error", "lr_scale"), "float32")
    return pd.DataFrame(rows, columns=columns).astype(types)


def empty_table():
    index = pa.dictionary(pa.int32(), pa.string())
    types = [pa.int64(), index, index, pa.int64(), pa.float32(), pa.float32(), pa.float32()]
    names = ["step", "component", "kind", "depth", "score", "error", "lr_scale"]
    return pa.schema(zip(names, types, strict=True)).empty_table().to_pandas()


def run_record(parts, steps, **changes):
    spent, full = 3.1e13, 9.9e13
    progress = np.linspace(0.1, 1, 10)
    record = {
        "schema": 1,
        "status": "finished",
        "method": "rgft",
        "task": "reviews",
        "model": "minilm",
        "seed": 7,
        "lr": 5e-5,
        "epochs": 3,
        "batch_size": 16,
        "granularity": "block",
        "budget": "0.3",
        "start": "survey of 512 samples: layer 4 explains most",
        "config": {"beta": 0.9, "alpha": 1.0, "budget": 0.3, "signal": "rgn", "bypass": False},
        "command": "rgft train --model minilm --task reviews --method rgft",
        "versions": {"rgft": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": {"cpu": "x86_64, 2 cores", "gpu": None, "threads": 2},
        "started": "2026-11-20T09:30:00+00:00",
        "seconds": {"train": 182.4, "overhead": 4.1, "evaluate": 20.7},
        "metric": "accuracy",
        "metrics": {
            "validation": {"loss": 0.241, "accuracy": 0.9342},
            "test": {"loss": 0.262, "accuracy": 0.9268},
            "amazon": {"loss": 0.391, "accuracy": 0.8814},
        },
        "history": [
            {
                "step": int(steps * p),
                "epoch": 3 * p,
                "flops": int(spent * p),
                "seconds": 182.4 * p,
                "validation": {
                    "accuracy": 0.94 - 0.4 * np.exp(-5 * p),
                    "loss": 0.24 + 0.5 * np.exp(-5 * p),
                },
            }
            for p in progress
        ],
        "train_loss": [
            {
                "step": step,
                "loss": 0.2 + 0.5 * np.exp(-4 * step / steps) * (1 + 0.3 * np.sin(step)),
                "lr": 5e-5 * (1 - step / steps),
                "flops": int(spent * step / steps),
            }
            for step in range(1, steps + 1)
        ],
        "flops": {"spent": int(spent), "full": int(full), "share": spent / full},
        "peak_memory_bytes": 1_503_238_553,
        "parameters": {
            "total": 22_700_000,
            "trainable": 22_700_000,
            "updated_per_step": {"mean": 5_300_000.0, "min": 3_500_000, "max": 22_700_000},
        },
        "components": [
            {"name": name, "kind": kind, "depth": depth, "numel": numel}
            for name, kind, depth, numel in parts
        ],
    }
    return record | changes


def write_run(folder, *, layers=6, steps=300, parts=None, table=None, **changes):
    parts = transformer_parts(layers) if parts is None else parts
    folder.mkdir(exist_ok=True, parents=True)
    record = run_record(parts, steps, **changes)
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    table = error_map_table(parts, steps) if table is None else table
    table.to_parquet(folder / "error_map.parquet", index=False)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", steps=120)


@pytest.fixture
def run(folder):
    return load_run(folder)


class Page(HTMLParser):
    """Tags and visible text of a page; scripts and styles apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self.style = [], "", [], ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "style":
            self.style += data
        else:
            self.text += data

    def figures(self):
        types = [attrs.get("type") for tag, attrs in self.tags if tag == "script"]
        return [
            json.loads(script)
            for script, kind in zip(self.scripts, types, strict=True)
            if kind == "application/json"
        ]


# ------------------------------------------------------------------------------ the folder


def test_report_and_picture_are_written_whole(folder):
    assert write_report(folder) == folder / "report.html"
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.json", "error_map.parquet", "report.html", "error_map.png"}
    assert (folder / "report.html").read_text("utf-8").endswith("</html>")
    height, width, _ = imread(folder / "error_map.png").shape
    assert grey_share((folder / "error_map.png").read_bytes()) < 0.01
    assert width == 9 * 150
    assert 300 < height < width


def test_writing_again_replaces_the_report(folder):
    (folder / "report.html").write_text("old")
    write_report(folder)
    first = (folder / "report.html").read_bytes()
    write_report(folder)
    assert (folder / "report.html").read_bytes() == first


def test_failed_write_leaves_the_old_report(folder, monkeypatch):
    (folder / "report.html").write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("layers", [0, 24, 150])
def test_report_stays_small(tmp_path, layers):
    folder = write_run(tmp_path, layers=layers, steps=410)
    assert write_report(folder).stat().st_size < 7_000_000


# ----------------------------------------------------------------------------- the records


def test_loaded_run_holds_what_was_recorded(run):
    assert (run.method, run.task, run.model, run.seed) == ("rgft", "reviews", "minilm", 7)
    assert run.headline("test") == 0.9268
    assert run.headline("absent") is None
    assert run.flops["share"] == pytest.approx(0.3131, abs=1e-4)
    assert len(run.history) == 10
    assert run.history[-1].metrics["accuracy"] == pytest.approx(0.9373, abs=1e-4)
    assert run.updated_per_step["min"] == 3_500_000
    assert [part.name for part in run.components] == list(run.error_map.names)


def test_null_stands_for_not_measured(tmp_path):
    run = load_run(write_run(tmp_path, peak_memory_bytes=None, granularity=None))
    assert np.isnan(run.peak_memory_bytes)
    assert run.granularity is None
    assert "n/a" in render_page(run)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no run.json"),
        ("{", "run.json is damaged"),
        ("\udcff", "run.json is damaged"),
        ("[1]", "run.json is not a record"),
        ('{"epoch": 3}', "run.json is not a record"),
        ('{"schema": 2}', "schema 1"),
        ('{"schema": 1}', 'run.json has no "status"'),
        ('{"schema": 1, "status": "interrupted"}', "rgft train --resume"),
        ('{"schema": 1, "status": "running"}', "rgft train --resume"),
        ('{"schema": 1, "status": "finished"}', 'run.json has no "parameters"'),
    ],
)
def test_foreign_run_json_is_refused_in_one_line(folder, content, said):
    path = folder / "run.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "lost"}, "\"status\" is 'lost' where one of finished, interrupted"),
        ({"seed": "7"}, "\"seed\" is '7' where an integer"),
        ({"seed": True}, '"seed" is True where an integer'),
        ({"lr": "fast"}, "\"lr\" is 'fast' where a number"),
        ({"method": None}, '"method" is None where a string'),
        ({"flops": {"spent": 1, "full": 2}}, 'has no "flops.share"'),
        ({"metrics": {"test": {"accuracy": "high"}}}, "\"metrics.test.accuracy\" is 'high'"),
        ({"metrics": [0.9]}, '"metrics" is [0.9] where an object'),
        ({"history": [3]}, '"history" is [3] where a list of objects'),
        ({"train_loss": [{"step": 1}]}, 'has no "train_loss[0].loss"'),
        ({"config": "x" * 500}, "…"),
    ],
)
def test_damaged_run_json_is_refused_in_one_line(tmp_path, changes, said):
    folder = write_run(tmp_path, steps=5, **changes)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def damage(table, how):
    if how == "column missing":
        return table.drop(columns="error")
    if how == "wrong type":
        return table.assign(step=table["step"].astype(float))
    if how == "text as depth":
        return table.assign(depth="deep")
    if how == "empty cells":
        return table.assign(component=table["component"].where(table["step"] > 1))
    return pd.concat([table, table.tail(2)])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("column missing", 'has no column "error"'),
        ("wrong type", 'column "step" is double where integer'),
        ("text as depth", 'column "depth" is'),
        ("empty cells", 'column "component" has 14 empty cells'),
        ("rows twice", "holds 2 rows whose step and component occur already"),
    ],
)
def test_damaged_error_map_is_refused_in_one_line(tmp_path, how, said):
    parts = transformer_parts(6)
    folder = write_run(tmp_path, parts=parts, table=damage(error_map_table(parts, 5), how))
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "does not exist"), (b"", "cannot be read"), (b"PAR1 and then noise", "cannot be read")],
)
def test_unreadable_error_map_is_refused_in_one_line(folder, content, said):
    path = folder / "error_map.parquet"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- the matrices


def test_matrices_equal_the_table_in_any_row_order(tmp_path):
    parts = transformer_parts(3)
    table = error_map_table(parts, 60)
    written = pd.concat([table[table["step"] == 1], table[table["step"] > 1].sample(frac=1)])
    grid = load_run(write_run(tmp_path, parts=parts, table=written)).error_map
    assert grid.names == tuple(name for name, *_ in parts)
    assert grid.kinds == tuple(kind for _, kind, *_ in parts)
    assert grid.steps.tolist() == list(range(1, 61))
    for row in table.sample(200, random_state=0).itertuples():
        k, t = grid.names.index(row.component), row.step - 1
        np.testing.assert_equal(grid.error[k, t], np.float32(row.error))
        np.testing.assert_equal(grid.frozen[k, t], row.lr_scale == 0)


def test_depth_decides_the_order(tmp_path):
    rows = [(1, "head", "head", 2, 1, 1, 1), (1, "embeddings", "embedding", 0, 1, 1, 1)]
    grid = load_run(write_run(tmp_path, parts=[], table=to_table(rows))).error_map
    assert grid.names == ("embeddings", "head")


def test_missing_cells_are_nan_and_not_frozen(tmp_path):
    rows = [(1, "a", "x", 0, 1, 1, 0), (2, "b", "x", 1, np.nan, np.inf, 0)]
    grid = load_run(write_run(tmp_path, parts=[], table=to_table(rows))).error_map
    np.testing.assert_array_equal(grid.error, [[1, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(grid.frozen, [[True, False], [False, True]])


def test_shares_of_a_step_sum_to_one(run):
    share = run.error_map.share
    np.testing.assert_allclose(share.sum(axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(share[3] / share[5], run.error_map.error[3] / run.error_map.error[5],
                               rtol=1e-4)  # fmt: skip


def test_thinning_keeps_first_and_last_step(run):
    grid = run.error_map.thinned(17)
    assert len(grid.steps) == grid.error.shape[1] == grid.lr_scale.shape[1] == 17
    assert (grid.steps[0], grid.steps[-1]) == (1, 120)
    columns = grid.steps - 1
    np.testing.assert_array_equal(grid.error, run.error_map.error[:, columns])
    assert run.error_map.thinned(120) is run.error_map


# -------------------------------------------------------------------------------- the figures


def test_error_map_views_show_share_raw_and_log(run):
    grid = run.error_map
    share, raw, log, marks, legend = error_map_figure(run).data
    np.testing.assert_allclose(np.square(share.z), grid.share, rtol=1e-5)
    np.testing.assert_array_equal(raw.z, grid.error)
    np.testing.assert_allclose(10**log.z, grid.error, rtol=1e-4)
    np.testing.assert_array_equal(np.isfinite(marks.z), grid.frozen)
    np.testing.assert_array_equal(marks.customdata[..., 0], grid.error)
    np.testing.assert_array_equal(marks.customdata[..., 2], grid.lr_scale)
    assert legend.name == "frozen"
    assert grid.frozen.any()
    assert not grid.frozen.all()


def test_first_component_is_at_the_bottom(run):
    axis = error_map_figure(run).layout.yaxis
    assert axis.categoryarray[0] == "embeddings"
    assert list(axis.range) == [-0.5, len(run.error_map.names) - 0.5]


def test_legend_speaks_of_frozen_only_where_some_is(tmp_path):
    rows = [(1, "a", "x", 0, 1, 1, 1)]
    run = load_run(write_run(tmp_path, parts=[], table=to_table(rows)))
    assert not any(trace.name == "frozen" for trace in error_map_figure(run).data)


def test_each_button_shows_exactly_its_view(run):
    figure = error_map_figure(run)
    (menu,) = figure.layout.updatemenus
    for index, button in enumerate(menu.buttons):
        change, traces = button.args
        assert [figure.data[trace].name for trace, on in
                zip(traces, change["visible"], strict=True) if on] == [button.label]  # fmt: skip
        assert figure.data[index].visible == (index == 0)
    assert len(menu.buttons) == 3


def test_lr_scale_is_symmetric_in_doublings(tmp_path):
    scales = {"a": 0.5, "b": 1.0, "c": 4.0, "d": 0.0}
    rows = [(1, name, "x", k, 1, 1, scale) for k, (name, scale) in enumerate(scales.items())]
    run = load_run(write_run(tmp_path, parts=[], table=to_table(rows)))
    cells, marks, _ = lr_scale_figure(run).data
    np.testing.assert_array_equal(cells.z[:, 0], [-1, 0, 2, np.nan])
    assert (cells.zmin, cells.zmax) == (-2, 2)
    assert cells.colorbar.ticktext == ("1/4x", "1/2x", "1x", "2x", "4x")
    assert np.isfinite(marks.z[:, 0]).tolist() == [False, False, False, True]


def test_quality_is_drawn_over_steps_and_flops(run):
    figure = quality_figure(run)
    steps, spent = figure.data[:2]
    assert list(steps.x) == [point.step for point in run.history]
    np.testing.assert_allclose(np.array(spent.x) * 1e12, [p.flops for p in run.history])
    assert list(steps.y) == list(spent.y) == [p.metrics["accuracy"] for p in run.history]
    assert figure.layout.xaxis2.title.text == "TFLOP"
    named = {line.name: line for line in figure.data if line.name}
    assert set(named) == {"training (running mean)", "validation"}
    expected = np.mean([point.loss for point in run.train_loss[-6:]])
    assert named["training (running mean)"].y[-1] == pytest.approx(expected)


def test_quality_draws_only_what_there_is(run):
    no_history = dataclasses.replace(run, history=())
    assert len(quality_figure(no_history).layout.annotations) == 1
    assert len(quality_figure(dataclasses.replace(run, train_loss=())).layout.annotations) == 2
    assert quality_figure(dataclasses.replace(no_history, train_loss=())) is None


def test_ranking_falls_and_hatches_the_frozen(run):
    figure, grid = ranking_figure(run), run.error_map
    order = list(figure.layout.yaxis.categoryarray)[::-1]
    by_error = sorted(grid.names, key=lambda name: -grid.error[grid.names.index(name), -1])
    assert order == by_error
    hatched = {
        name
        for bars in figure.data
        for name, shape in zip(bars.y, bars.marker.pattern.shape, strict=True)
        if shape
    }
    assert hatched == {
        n for n, frozen in zip(grid.names, grid.frozen[:, -1], strict=True) if frozen
    }
    assert {bars.name for bars in figure.data} == {"embedding", "attention", "feed forward", "head"}


def test_ranking_of_many_components_stops_at_forty(tmp_path):
    run = load_run(write_run(tmp_path, layers=150, steps=5))
    assert sum(len(bars.y) for bars in ranking_figure(run).data) == 40
    assert "The 40 largest of 302 components" in render_page(run)


@pytest.mark.parametrize("count", [1, 2, 40, 300])
def test_maps_of_any_size_have_readable_labels(tmp_path, count):
    parts = [(f"{'deep.' * 30}{k}", "layer", k, 10) for k in range(count)]
    run = load_run(write_run(tmp_path, parts=parts, steps=3))
    for draw in (error_map_figure, lr_scale_figure):
        layout = draw(run).layout
        assert 200 < layout.height < 1600
        assert (layout.height - 130) / len(layout.yaxis.tickvals) >= 13
        assert all(len(text) <= 34 for text in layout.yaxis.ticktext)
        assert len(layout.yaxis.categoryarray) == count  # whole names, for the pointer
    assert error_map_png(run).startswith(b"\x89PNG")


# ---------------------------------------------------------------------------- awkward records


@pytest.mark.parametrize("status", ["finished", "interrupted"])
def test_run_without_anything_recorded(tmp_path, status):
    folder = write_run(
        tmp_path, table=empty_table(), history=[], train_loss=[], metrics={}, status=status
    )
    (folder / "error_map.png").write_bytes(b"of an earlier run")
    page = Page(write_report(folder).read_text("utf-8"))
    run = load_run(folder)
    assert all(draw(run) is None for draw in FIGURES)
    assert error_map_png(run) is None
    assert not (folder / "error_map.png").exists()
    assert page.text.count("No error map was recorded.") == 3
    assert "No final metrics were recorded." in page.text
    assert ("This run has not finished (interrupted)." in page.text) == (status != "finished")
    assert not page.figures()


def test_interrupted_run_shows_its_last_evaluation(tmp_path):
    run = load_run(write_run(tmp_path, metrics={}, status="interrupted"))
    assert "last: 0.937 at step 300" in render_page(run)


def test_stages_and_runs_without_a_decision_are_told(tmp_path):
    stages = [{"share": 0.1, "validation": 0.8}, {"share": 0.2, "validation": 0.79}]
    changes = {"budget_auto": {"stages": stages, "chosen": 0}, "idle": True}
    text = Page(render_page(load_run(write_run(tmp_path / "auto", **changes)))).text
    assert "10% 0.8 (kept), 20% 0.79" in text and "before the method's first decision" in text
    text = Page(render_page(load_run(write_run(tmp_path / "plain")))).text
    assert "(kept)" not in text and "first decision" not in text


def test_typeless_empty_table_counts_as_no_error_map(tmp_path):
    folder = write_run(tmp_path, table=pd.DataFrame({name: [] for name in empty_table().columns}))
    assert load_run(folder).error_map is None


def grey_share(png):
    """How much of a picture has the colour of cells without a score."""
    pixels = imread(io.BytesIO(png))[..., :3]
    return np.isclose(pixels, np.array([0xE9, 0xEC, 0xEF]) / 255, atol=1 / 255).all(-1).mean()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_map_without_a_usable_error_is_still_drawn(tmp_path, value):
    parts = transformer_parts(1)
    table = error_map_table(parts, 10).assign(error=np.float32(value), score=np.float32(np.nan))
    run = load_run(write_run(tmp_path, parts=parts, table=table, steps=10))
    assert ranking_figure(run) is None
    assert error_map_png(run).startswith(b"\x89PNG")
    assert grey_share(error_map_png(run)) > 0.3
    (first, *_) = Page(render_page(run)).figures()
    assert first["data"][0]["type"] == "heatmap"


def test_diverged_losses_and_idle_clocks(tmp_path):
    loss = [{"step": s, "loss": [0.5, None, float("inf")][s % 3], "lr": 1, "flops": s}
            for s in range(90)]  # fmt: skip
    seconds = {"train": 0.0, "overhead": 0.0, "evaluate": None}
    run = load_run(write_run(tmp_path, train_loss=loss, seconds=seconds))
    for text in (
        figure for figure in Page(render_page(run)).scripts if figure.startswith('{"data')
    ):
        assert not re.search(r"\b(NaN|Infinity)\b", text)
        json.loads(text)


# ------------------------------------------------------------------------------------ the page


def test_page_states_the_key_figures(run):
    page = Page(render_page(run))
    assert "rgft on reviews with minilm" in page.text
    for said in (
        "0.934", "0.927", "31.3%", "of full fine-tuning's 99 TFLOP", "23.3%", "3 min 2 s", "4.1 s",
        "2.2% of training time", "1.4 GiB", "amazon (out of domain)", "0.881", "2.13.0",
        run.command, "seed 7",
    ):  # fmt: skip
        assert said in page.text
    assert len(page.figures()) == 4
    assert [tag for tag, _ in page.tags].count("figcaption") == 4


def test_splits_come_in_order_and_the_headline_metric_first(run):
    text = Page(render_page(run)).text
    text = text[text.index("Metrics") :]
    assert text.index("accuracy") < text.index("loss")
    assert text.index("validation") < text.index("test") < text.index("amazon")


def test_page_is_a_pure_function_of_the_records(folder):
    assert render_page(load_run(folder)) == render_page(load_run(folder))


def test_page_loads_nothing(run):
    text = render_page(run)
    assert text.count(get_plotlyjs()) == 1
    own = text.replace(get_plotlyjs(), "")
    page = Page(text)
    loading = {"src", "href", "srcset", "data", "action", "background", "poster", "ping"}
    assert not [(tag, attrs) for tag, attrs in page.tags if loading & set(attrs)]
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base"}
    for forbidden in ("url(", "@import", "http://", "https://", "fetch(", "XMLHttpRequest"):
        assert forbidden not in own
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_page_offers_no_upload_of_the_figures(run):
    script = Page(render_page(run)).scripts[-1]
    assert "showSendToCloud: false" in script
    assert 'plotlyServerURL: ""' in script


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'$x^2$ \u2028 層"


def test_hostile_names_stay_text(tmp_path):
    benign = Page(render_page(load_run(write_run(tmp_path / "benign", steps=60))))
    parts = [(f"{HOSTILE}{name}", HOSTILE + kind, depth, numel)
             for name, kind, depth, numel in transformer_parts(6)]  # fmt: skip
    record = run_record(parts, 60)
    changes = dict.fromkeys(("method", "task", "model", "command", "started", "metric"), HOSTILE)
    changes |= {key: {HOSTILE: HOSTILE} for key in ("versions", "hardware", "config")}
    changes["metrics"] = {HOSTILE: {HOSTILE: 0.5, "loss": 1}}
    changes["history"] = [row | {"validation": {HOSTILE: 0.5}} for row in record["history"]]
    folder = write_run(tmp_path / "hostile", parts=parts, steps=60, **changes)
    page = Page(write_report(folder).read_text("utf-8"))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in benign.tags}
    assert len(page.scripts) == len(benign.scripts)
    assert not any("alert(1)" in script for script in page.scripts[-2:])
    assert HOSTILE in page.text
    for figure in page.figures():  # plotly turns tags in labels into markup: none may reach it
        assert not re.search(r"<(script|img|/script)", json.dumps(figure))


def test_picture_is_of_the_shares(run):
    grid = run.error_map
    assert imread(io.BytesIO(error_map_png(run))).shape[1] == 1350
    louder = dataclasses.replace(grid, error=1000 * grid.error)
    assert error_map_png(dataclasses.replace(run, error_map=louder)) == error_map_png(run)
    other = dataclasses.replace(grid, error=grid.error[::-1])
    assert error_map_png(dataclasses.replace(run, error_map=other)) != error_map_png(run)


def test_what_the_library_writes_can_be_reported(tmp_path):
    parts = [Component(name, kind, depth, (), numel)
             for name, kind, depth, numel in transformer_parts(2)]  # fmt: skip
    error_map = ErrorMap(parts, beta=0.5)
    for step in range(8):
        error_map.update(torch.arange(6.0), observed=torch.arange(6) != step % 6)
        error_map.record(step, tuple(float(k != step % 6) for k in range(6)))
    error_map.to_parquet(tmp_path / "error_map.parquet")
    record = run_record(transformer_parts(2), 8)
    del record["schema"]
    records.write_run(tmp_path, record)
    write_report(tmp_path)
    grid = load_run(tmp_path).error_map
    assert grid.names == tuple(part.name for part in parts)
    np.testing.assert_allclose(grid.error[:, -1], error_map.values, rtol=1e-6)
    assert grid.frozen.sum(axis=0).tolist() == [1] * 8


def test_library_without_a_step_has_no_error_map(tmp_path):
    parts = [Component("a", "layer", 0, (), 1)]
    write_run(tmp_path, table=empty_table())
    ErrorMap(parts, beta=0.5).to_parquet(tmp_path / "error_map.parquet")
    assert load_run(tmp_path).error_map is None
