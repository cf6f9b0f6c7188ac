"""Runs that find their own budget: stages, what ends them, which model is kept, resuming."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from rgft import Budget, Config, FlopMeter, InputError, Spending
from rgft.budgeting import task_yardstick
from rgft.integrations.transformers import RGFTCallback
from rgft.spec import RunSpec, command
from rgft.stages import STAGES, Yardstick
from rgft.tasks import TaskData
from rgft.train import run
from runs import assert_same, finish, record_of, start, warm_up
from tiny import bert, tokens

LOSS = Yardstick("loss", lower_is_better=True)


@pytest.fixture(scope="module")
def spec(tiny_model: Path, tiny_data: Path) -> RunSpec:
    return RunSpec(
        model=str(tiny_model),
        data=str(tiny_data),
        epochs=6,
        batch_size=4,
        lr=1e-3,
        evaluations=1,
        budget="auto",
    )


@pytest.fixture(scope="module")
def learned(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of full fine-tuning that is slow to leave the majority class."""
    folder = tmp_path_factory.mktemp("learned")
    return folder, run(replace(spec, method="full"), folder)


def test_a_plateau_at_chance_does_not_end_a_run(learned: tuple[Path, dict[str, Any]]) -> None:
    _, record = learned
    values = [stage["validation"] for stage in record["budget_auto"]["stages"]]
    assert max(values[:2]) == 0.55  # the share of the majority
    assert max(values) > 0.9
    assert values[record["budget_auto"]["chosen"]] == max(values)


def test_what_was_spent_is_that_of_the_last_stage(learned: tuple[Path, dict[str, Any]]) -> None:
    _, record = learned
    shares = [stage["share"] for stage in record["budget_auto"]["stages"]]
    assert shares == pytest.approx(STAGES[: len(shares)], abs=0.005)
    assert record["flops"]["share"] == shares[-1]
    for stage in record["budget_auto"]["stages"]:
        assert look_at(record, stage)["accuracy"] == stage["validation"]


def look_at(record: dict[str, Any], stage: dict[str, float]) -> dict[str, float]:
    """The evaluation at the end of a stage."""
    looks = {look["flops"] / record["flops"]["full"]: look for look in record["history"]}
    return dict(looks[stage["share"]]["validation"])


class Script:
    """Stages end as they do, and are said to be worth what is written here."""

    def __init__(self, patch: pytest.MonkeyPatch, *values: float) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        close, script = Spending.close_stage, iter(values)

        def scripted(spending: Spending, validation: float) -> bool:
            del validation
            named = spending.meter.model.named_parameters()
            self.weights.append({name: p.detach().clone() for name, p in named})
            return close(spending, next(script))

        patch.setattr(Spending, "close_stage", scripted)


@pytest.mark.parametrize("method", ["full", "rgft", "lora"])
def test_the_best_stage_is_what_is_saved(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    script = Script(monkeypatch, 0.5, 0.9, 0.7)
    record = run(replace(spec, method=method, epochs=4), tmp_path)
    _, best, last = record["budget_auto"]["stages"]
    assert record["budget_auto"]["chosen"] == 1
    assert record["metrics"]["validation"] == look_at(record, best)
    assert record["metrics"]["validation"] != look_at(record, last)
    assert record["flops"]["share"] == last["share"] == pytest.approx(0.4, abs=0.01)
    if method != "lora":  # its pairs are merged in
        saved = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(saved[name], kept) for name, kept in script.weights[1].items())


@pytest.mark.parametrize("method", ["full", "rgft", "lora"])
def test_a_killed_run_resumes_to_the_same_bits(spec: RunSpec, tmp_path: Path, method: str) -> None:
    warm_up()
    given = replace(spec, method=method, epochs=4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = command(given).split()[1:]
    assert finish(start([*arguments, "--output-dir", str(whole)], whole)) == 0
    process = start([*arguments, "--output-dir", str(cut)], cut)
    for saved in (2, 4):  # checkpoints written: within the first stages, and beyond them
        seen: set[str] = set()
        while len(seen) < saved and process.is_alive():
            seen |= {p.name for p in cut.glob("checkpoints/checkpoint-*")}
            time.sleep(0.002)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        process = start(["train", "--resume", "--output-dir", str(cut)], cut)
    assert finish(process) == 0
    assert record_of(cut)["resumed"]
    assert_same(whole, cut)


@pytest.mark.parametrize("budget", ["auto", "0.2"])
def test_a_run_cut_off_after_its_last_step_makes_no_other(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    given = replace(spec, method="full", epochs=3, lr=3e-3, budget=budget)
    record = run(given, whole)
    with monkeypatch.context() as patch:
        patch.setattr("rgft.train.outcome", _cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(given, cut)
    run(given, cut, resume=True)
    assert record_of(cut)["resumed"][0]["step"] == record["history"][-1]["step"]
    assert_same(whole, cut)


def test_a_best_model_that_is_gone(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(spec, method="full", epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr("rgft.train.outcome", _cut_off)
        Script(patch, 0.5, 0.9, 0.7)
        with pytest.raises(KeyboardInterrupt):
            run(given, tmp_path)
    found = tmp_path.glob("checkpoints/checkpoint-*")
    best, _ = sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))
    shutil.rmtree(best)
    with pytest.raises(InputError, match="the best model of the run so far, is gone"):
        run(given, tmp_path, resume=True)


def _cut_off(*args: object) -> None:
    raise KeyboardInterrupt


def test_other_budgets_have_no_stages(spec: RunSpec, tmp_path: Path) -> None:
    record = run(replace(spec, method="full", budget="0.05"), tmp_path)
    assert record["budget_auto"] is None


def task(labels: list[Any], names: tuple[str, ...]) -> TaskData:
    rows = datasets.Dataset.from_dict({"text": ["x"] * len(labels), "label": labels})
    kind, metric = ("classification", "accuracy") if names else ("regression", "pearson")
    return TaskData("mine", kind, ("text",), "label", names, metric, {"validation": rows})  # type: ignore[arg-type]


def test_chance_is_the_best_answer_that_ignores_its_input() -> None:
    yardstick = task_yardstick(task([0, 1, 1, 2], ("a", "b", "c")))
    assert yardstick == Yardstick("accuracy", rows=4, chance=0.5)
    assert task_yardstick(task([0.5, 1.0, 2.5], ())) == Yardstick("pearson", rows=3, chance=0.0)


def test_a_validation_split_that_tells_nothing() -> None:
    with pytest.raises(InputError, match="1 different labels, so that --budget auto cannot see"):
        task_yardstick(task([1, 1, 1], ("a", "b")))


def test_stages_need_something_to_judge_them_by() -> None:
    with pytest.raises(InputError, match="give yardstick="):
        Spending(FlopMeter(bert()), Budget(share=1.0, auto=True), batches=10)


def loop(values: Iterator[float], yardstick: Yardstick, batches: int) -> tuple[Spending, list[int]]:
    """A loop of one's own, and the steps at which its stages ended."""
    model, batch = bert(), tokens()[0]
    budget = Budget(share=1.0, auto=True)
    spending = Spending(FlopMeter(model), budget, batches=batches, yardstick=yardstick)
    step, ends = 0, []
    while not spending.finished:
        model(**batch)
        step += 1
        spending.step()
        if spending.stage_ended:
            spending.close_stage(next(values))
            ends.append(step)
    return spending, ends


def test_a_loop_of_ones_own() -> None:
    spending, ends = loop(iter([0.5, 0.4, 0.39, 0.3899, 0.3898]), LOSS, 100)
    assert ends == [10, 20, 40, 80, 100]
    assert spending.best == 4
    spending, ends = loop(iter([0.5, 0.4, 0.5, 0.399]), LOSS, 100)
    assert ends == [10, 20, 40, 80]
    assert spending.best == 3
    assert spending.progress == pytest.approx(0.8)
    assert [stage.share for stage in spending.stages] == pytest.approx([0.1, 0.2, 0.4, 0.8])


def test_a_stage_that_has_not_ended_is_not_closed() -> None:
    spending, _ = loop(iter([0.5, 0.5, 0.5]), LOSS, 100)
    with pytest.raises(InputError, match="no stage has ended"):
        spending.close_stage(0.1)
    fixed = Spending(FlopMeter(bert()), Budget(share=0.5), batches=10)
    with pytest.raises(InputError, match="no stage has ended"):
        fixed.close_stage(0.1)
    assert fixed.best is None


def test_steps_longer_than_a_stage_skip_it() -> None:
    _, ends = loop(iter([0.5, 0.4, 0.3, 0.2, 0.1]), LOSS, 3)
    assert ends == [1, 2, 3]


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a batch, over and over."""

    def __init__(self, count: int) -> None:
        batch = tokens()[0]
        self.rows = [{k: v[i % len(v)] for k, v in batch.items()} for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def trainer(folder: Path, values: list[float], **settings: Any) -> tuple[Trainer, RGFTCallback]:
    """100 steps of full fine-tuning; its evaluations find `values`, one by one."""
    script, callback = iter(values), RGFTCallback(Config(every=5), budget="auto")
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=10,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        learning_rate=1e-4,
        **{"eval_strategy": "steps", "eval_steps": 10_000, "save_strategy": "no", **settings},
    )
    runner = Trainer(
        model=bert(),
        args=arguments,
        train_dataset=Rows(40),
        eval_dataset=Rows(4),
        callbacks=[callback],
        compute_metrics=lambda _: {"score": next(script)},
    )
    return runner, callback


def test_a_trainer_finds_its_budget(tmp_path: Path) -> None:
    named = {"metric_for_best_model": "score", "lr_scheduler_type": "linear"}
    runner, callback = trainer(tmp_path, [0.3, 0.3, 0.5, 0.5, 0.9], **named)
    runner.train()
    assert callback.spending is not None
    assert [round(s.share, 6) for s in callback.spending.stages] == list(STAGES)
    assert runner.state.global_step == 100
    runner, callback = trainer(tmp_path, [0.3, 0.5, 0.5, 0.5], **named)
    runner.train()
    assert runner.state.global_step == 80
    rates = [entry["learning_rate"] for entry in runner.state.log_history if "loss" in entry]
    restarts = [step for step, (a, b) in enumerate(pairwise(rates), start=1) if b > a]
    assert restarts == [10, 20, 40]
    assert [rates[step] for step in restarts] == [pytest.approx(1e-4)] * 3
    assert [rates[step - 1] for step in (10, 20, 40)] == pytest.approx([1e-5, 1e-5, 5e-6])


def test_a_trainer_without_evaluations(tmp_path: Path) -> None:
    runner, _ = trainer(tmp_path, [], eval_strategy="no")
    with pytest.raises(InputError, match="judges by evaluations: give the Trainer an eval_dataset"):
        runner.train()


def test_a_metric_that_the_trainer_has_not(tmp_path: Path) -> None:
    runner, _ = trainer(tmp_path, [0.1] * 5)
    runner.eval_dataset = {"one": Rows(4), "two": Rows(4)}  # eval_one_loss, eval_two_loss
    with pytest.raises(InputError, match="the evaluation has no 'loss'"):
        runner.train()


def test_a_trainer_that_ends_within_a_stage_says_so(tmp_path: Path) -> None:
    runner, callback = trainer(tmp_path, [0.1] * 5)
    callback.config = Config(policy="head-only")
    with pytest.warns(RuntimeWarning, match="in the middle of a stage"):
        runner.train()
    assert np.isfinite(runner.state.log_history[-1]["train_loss"])
