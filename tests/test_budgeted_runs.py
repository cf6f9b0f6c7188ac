"""Whole runs with a budget: met, paced, and resumed exactly."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rgft.batches import TextInputs
from rgft.budgeting import SURVEY_FEW, batch_shapes, full_fine_tuning_flops
from rgft.costs import CostModel
from rgft.errors import InputError
from rgft.methods import METHODS
from rgft.models import load_classifier
from rgft.policies import find_policy
from rgft.rate_scale import rate_scale
from rgft.spec import RunSpec, command
from rgft.survey import SOMETHING
from rgft.tasks import load_folder
from rgft.train import run
from runs import assert_a_kill_leaves_no_trace, call
from tiny_run import FILLER, build_data, build_model


@pytest.fixture(scope="module")
def spec(tiny_model: Path, tiny_data: Path) -> RunSpec:
    return RunSpec(
        model=str(tiny_model),
        data=str(tiny_data),
        epochs=3,
        batch_size=2,
        lr=1e-3,
        evaluations=1,
        settings={"every": 5},
    )


SMALL = ("rgft", "full", "lora", "rgft-threshold", "linear-probing")


@pytest.mark.parametrize(
    ("method", "budget"), [*((m, 0.33) for m in METHODS), *((m, 0.1) for m in SMALL)]
)
def test_the_budget_is_met(spec: RunSpec, tmp_path: Path, method: str, budget: float) -> None:
    config = METHODS[method].config
    settings: dict[str, int] = {}
    if find_policy(replace(config, total_steps=1)).changes:
        settings = {"every": min(config.every, 5)}
    settings |= {"warmup": 5} if config.warmup else {}
    record = run(replace(spec, method=method, budget=str(budget), settings=settings), tmp_path)
    assert abs(record["flops"]["share"] - budget) < 0.01
    assert record["flops"]["spent"] / record["flops"]["full"] == record["flops"]["share"]
    assert record["budget"] == str(budget)
    assert record["history"][-1]["flops"] == record["flops"]["spent"]
    rates = [entry["lr"] for entry in record["train_loss"]]
    assert rates[-1] == min(rates) < 0.6e-3


def test_a_run_well_over_its_budget_says_so(
    tiny_model: Path,
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of one step there is no hundredth."""
    given = ["--model", str(tiny_model), "--data", str(small_data), "--epochs", "1"]
    for budget, said in (("0.01", 1), ("1", 0)):
        options = ["--method", "full", "--budget", budget, "--output-dir", str(tmp_path / budget)]
        assert call(monkeypatch, "train", *given, *options) == 0
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == said
        assert all("spent 100.0% of full fine-tuning, over its budget of 1.0%" in s for s in lines)


def test_full_fine_tuning_costs_what_it_was_priced_at(spec: RunSpec, tmp_path: Path) -> None:
    """By the meter of a real run, whose batches are drawn in another order."""
    whole = run(replace(spec, method="full", batch_size=8, settings={}), tmp_path)["flops"]["full"]
    inputs = TextInputs(spec.model, 128)
    data = load_folder(Path(str(spec.data)), None, None)
    rows = inputs.examples(data, "train")
    costs = CostModel(inputs.load_model(data.label_names))
    lengths = [inputs.lengths(row) for row in rows]
    shapes = batch_shapes(lengths, inputs.multiple, batch_size=8, epochs=3, seed=5)
    priced = full_fine_tuning_flops(costs, shapes, inputs.longest(rows), inputs)
    assert priced == pytest.approx(whole, rel=0.02)


def test_every_row_is_priced_once_an_epoch() -> None:
    shapes = batch_shapes([[n] for n in range(1, 100)], 2, batch_size=8, epochs=2.0, seed=0)
    assert sum(rows * count for (rows, _), count in shapes.items()) == 2 * 99
    assert sum(shapes.values()) == 2 * 13
    half = batch_shapes([[n] for n in range(1, 100)], 2, batch_size=8, epochs=0.5, seed=0)
    assert sum(half.values()) == 7


def test_the_survey_is_paid_for_and_recorded(spec: RunSpec, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"the survey saw \d+ samples; of fewer than 128"):
        record = run(replace(spec, method="rgft", budget="0.3"), tmp_path)
    survey = record["survey"]
    assert survey["depths"] == (1, 2)
    assert len(survey["explained"]) == 2
    assert survey["samples"] > 0
    assert record["config"]["frozen_below"] in (1, 2)
    assert record["start"].startswith(f"survey of {survey['samples']} samples: ")
    assert f"{record['layers']['kept']} of 2 layers kept" in record["start"]
    chosen = run(
        replace(spec, method="rgft", budget="0.3", settings={"every": 5, "frozen_below": 2}),
        tmp_path / "chosen",
    )
    assert chosen["survey"] is None
    assert chosen["config"]["frozen_below"] == 2
    model = load_classifier(str(spec.model), ("bad", "good"), 0)
    train = [*model.bert.encoder.layer[1].parameters()]
    train += [*model.bert.pooler.parameters(), *model.classifier.parameters()]
    assert chosen["parameters"]["trainable"] == sum(p.numel() for p in train)


def guessed(rng: random.Random) -> dict[str, Any]:
    """A text that says nothing of its label."""
    return {"text": " ".join(rng.choices(FILLER, k=6)), "label": rng.choice(("good", "bad"))}


def test_labels_that_no_layer_knows_train_every_layer_if_there_are_visits_enough(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(tmp_path / "model", layers=6)
    data = build_data(tmp_path / "data", guessed, {"train": 300, "validation": 20, "test": 20})
    given = replace(spec, model=str(model), data=str(data), method="rgft", budget="0.4")
    given = replace(given, batch_size=None, lr=None)
    recipes = METHODS["rgft"].surveyed
    assert recipes is not None
    scale = rate_scale(load_classifier(str(model), ("bad", "good"), 0))
    few = run(given, tmp_path / "few")
    assert max(few["survey"]["explained"]) < SOMETHING
    assert few["layers"]["kept"] == 6 and few["config"]["frozen_below"] == 4  # the upper half
    assert "embeddings and the lowest 3 of them frozen, since the budget buys" in few["start"]
    assert few["lr"] == pytest.approx(recipes.between(3 / 5).lr * scale)
    assert (few["batch_size"], few["adam_beta2"]) == (16, recipes.shallow.adam_beta2)
    monkeypatch.setattr("rgft.opening.VISITS_OF_ALL", 200)  # as if 300 rows were many
    many = run(given, tmp_path / "many")
    assert many["layers"]["kept"] == 5 and many["config"]["frozen_below"] == 1
    assert many["lr"] == pytest.approx(recipes.deep.lr * scale)
    assert (many["batch_size"], many["adam_beta2"]) == (16, recipes.deep.adam_beta2)
    assert few["visits"] > 1.3 * many["visits"]
    assert "few visits" not in many["start"]
    auto = run(replace(given, budget="auto"), tmp_path / "auto")
    assert auto["history"][0]["flops"] / auto["flops"]["full"] < 0.11  # 100 visits or so
    assert auto["config"]["frozen_below"] == 1  # there may be more of them


def test_a_survey_of_enough_samples_says_nothing_of_chance(spec: RunSpec, tmp_path: Path) -> None:
    data = build_data(tmp_path / "data", rows={"train": 300, "validation": 20, "test": 20})
    plenty = replace(spec, data=str(data), method="rgft", budget="0.9", batch_size=32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the survey saw")
        record = run(plenty, tmp_path / "run")
    assert record["survey"]["samples"] >= SURVEY_FEW


def test_a_time(spec: RunSpec, tmp_path: Path) -> None:
    record = run(replace(spec, method="full", settings={}, budget="2s"), tmp_path)
    assert record["flops"]["share"] > 0
    assert record["status"] == "finished"


def test_the_prefix_cache_buys_steps(spec: RunSpec, tmp_path: Path) -> None:
    """At the same budget, which is met also by what the comparisons cost."""
    frozen = replace(spec, budget="0.9", settings={"every": 5, "frozen_below": 2})
    cached = run(frozen, tmp_path / "cached")
    bare = run(replace(frozen, prefix_cache="off"), tmp_path / "bare")
    use = cached["prefix_cache"]
    assert use["misses"] == 120 == cached["rows"]["train"]
    assert use["hits"] == cached["visits"] - use["misses"] > 0
    assert use["checks"] > 0
    assert bare["prefix_cache"] is None
    assert cached["visits"] > 1.05 * bare["visits"]
    assert abs(cached["flops"]["share"] - 0.9) < 0.01 > abs(bare["flops"]["share"] - 0.9)
    assert not (tmp_path / "cached" / "checkpoints").exists()


def test_no_cache_where_no_sample_comes_back(spec: RunSpec, tmp_path: Path) -> None:
    few = replace(spec, budget="0.1", settings={"every": 5, "frozen_below": 2})
    assert run(few, tmp_path)["prefix_cache"] is None


@pytest.mark.parametrize("method", ["rgft", "full"])
def test_well_predicted_samples_are_skipped(spec: RunSpec, tmp_path: Path, method: str) -> None:
    settings = {"every": 5} if method == "rgft" else {}
    record = run(replace(spec, method=method, budget="1", skip=0.9, settings=settings), tmp_path)
    table = pd.read_parquet(tmp_path / "residuals.parquet")
    assert len(table) == record["rows"]["train"]
    assert table["visits"].sum() == record["visits"]
    assert table["visits"].min() >= 1
    assert table["visits"].max() - table["visits"].min() >= 2  # at most 1 where none is skipped
    assert abs(record["flops"]["share"] - 1) < 0.01


def test_without_a_budget_the_ledger_is_kept_too(spec: RunSpec, tmp_path: Path) -> None:
    record = run(replace(spec, epochs=2), tmp_path)
    table = pd.read_parquet(tmp_path / "residuals.parquet")
    assert (table["visits"] == 2).all()
    assert record["history"][-1]["epoch"] == 2
    assert table["correct"].max() == 2


RESUMED = {
    "rgft": {"settings": {"every": 5}},
    "rgft-threshold": {"settings": {"every": 5, "warmup": 5}},
    "full": {"settings": {}, "skip": 0.5, "group_by_length": True},
    "rgft, cached": {"settings": {"every": 5, "frozen_below": 2}, "skip": 0.5, "budget": "0.9"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_run_resumes_to_the_same_bits(spec: RunSpec, tmp_path: Path, case: str) -> None:
    method, _, _ = case.partition(",")
    options = {"method": method, "budget": "0.6", "evaluations": 2, **RESUMED[case]}
    given = replace(spec, **options)
    assert_a_kill_leaves_no_trace(command(given).split()[1:], tmp_path)


def test_rare_classes_can_count_more(spec: RunSpec, tmp_path: Path) -> None:
    """The loss is weighted, the ledger is not."""
    given = replace(spec, method="full", budget="0.3", settings={})
    plain = run(given, tmp_path / "plain")
    balanced = run(replace(given, balance=1.0), tmp_path / "balanced")
    assert plain["train_loss"][0]["loss"] != balanced["train_loss"][0]["loss"]
    assert plain["flops"] == balanced["flops"]


def test_a_budget_of_rgft_turns_dropout_off(spec: RunSpec, tmp_path: Path) -> None:
    """In the run, not in the model that it leaves."""
    given = replace(spec, budget="0.3")
    without = run(given, tmp_path / "without")
    assert without["dropout"] is False
    with_it = run(replace(given, dropout=True), tmp_path / "with")
    assert with_it["dropout"] is True
    assert with_it["train_loss"] != without["train_loss"]
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    assert config["hidden_dropout_prob"] == 0.1


def test_dropout_can_be_turned_off_without_a_budget(spec: RunSpec, tmp_path: Path) -> None:
    given = replace(spec, method="full", epochs=1, settings={})
    acts = run(given, tmp_path / "acts")
    off = run(replace(given, dropout=False), tmp_path / "off")
    assert (acts["dropout"], off["dropout"]) == (True, False)
    assert acts["train_loss"] != off["train_loss"]


def test_turning_off_dropout_that_is_not_there_is_refused(spec: RunSpec, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(spec.model, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    given = replace(spec, model=str(model), method="full", epochs=1, settings={})
    assert run(given, tmp_path / "plain")["status"] == "finished"
    with pytest.raises(InputError, match="--no-dropout has no effect"):
        run(replace(given, dropout=False), tmp_path / "off")


def test_products_can_be_in_16_bits(spec: RunSpec, tmp_path: Path) -> None:
    given = replace(spec, method="full", budget="0.1", settings={})
    wide = run(given, tmp_path / "wide")
    short = run(replace(given, precision="bfloat16"), tmp_path / "short")
    assert wide["flops"] == short["flops"]
    losses = [r["train_loss"][0]["loss"] for r in (wide, short)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_layers_can_be_dropped(spec: RunSpec, tmp_path: Path) -> None:
    """Cheaper steps of a model that is saved as it trained."""
    given = replace(spec, method="full", budget="0.3", settings={})
    whole = run(given, tmp_path / "whole")
    cut = run(replace(given, keep_layers=1), tmp_path / "cut")
    assert whole["layers"] == {"kept": 2, "of": 2}
    assert cut["layers"] == {"kept": 1, "of": 2}
    assert cut["flops"]["full"] == whole["flops"]["full"]
    assert cut["visits"] > 1.5 * whole["visits"]
    assert abs(cut["flops"]["share"] - 0.3) < 0.01
    assert load_classifier(str(tmp_path / "cut"), ("bad", "good"), 0).config.num_hidden_layers == 1
