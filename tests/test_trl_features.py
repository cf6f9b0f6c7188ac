"""What TRL and sentence-transformers do besides stepping: runs are those frozen by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import IntervalStrategy

from loops import scaled_as_on_gpus
from rgft import Config, InputError, Policy, Situation
from rgft.components import Component
from rgft.execution.stored_samples import Storage
from rgft.integrations.transformers import RGFTCallback
from rgft.stages import STAGES
from test_trl import TRAINERS, pytestmark  # noqa: F401 - the warnings to ignore
from tiny import same_state, values

STEPS, RATE = 6, 1e-2
Plan = tuple[float, ...]


def moving_boundary(situation: Situation) -> Tensor:
    """Freezes none, one and two of the deepest, again and again."""
    scale = torch.ones_like(situation.error)
    scale[: situation.step // 2 % 3] = 0.0
    return scale


CONFIG = Config(policy=Policy(moving_boundary, uses_error=False, freezes=True), every=2)


class Plans(RGFTCallback):
    """Remembers the plan of every step."""

    def __init__(self, **given: Any) -> None:
        super().__init__(CONFIG, **given)
        self.seen: list[Plan] = []

    def on_step_begin(self, *given: Any, **kwargs: Any) -> None:
        super().on_step_begin(*given, **kwargs)
        assert self.guide is not None
        self.seen.append(self.guide.plan.lr_scale)


class ByHand(TrainerCallback):  # type: ignore[misc]
    """Freezes what plans freeze, without a guide; notes the norms of the gradients of each step."""

    def __init__(self, components: Sequence[Component], plans: list[Plan]) -> None:
        self.components, self.plans = components, plans
        self.norms: list[list[float]] = []

    def _owned(self, model: nn.Module) -> list[list[nn.Parameter]]:
        named = dict(model.named_parameters())
        return [[named[piece.parameter] for piece in c.slices] for c in self.components]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, control
        plan = self.plans[state.global_step]
        for owned, scale in zip(self._owned(kwargs["model"]), plan, strict=True):
            for parameter in owned:
                parameter.requires_grad_(scale > 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, control
        plan, norms = self.plans[state.global_step], []
        for owned, scale in zip(self._owned(kwargs["model"]), plan, strict=True):
            if not scale:  # peft lets what is frozen have gradients
                for parameter in owned:
                    parameter.grad = None
            squares = [p.grad.square().sum() for p in owned if p.grad is not None]
            norms.append(torch.stack(squares).sum().sqrt().item() if squares else torch.nan)
        self.norms.append(norms)


def compiled(trainer: Any) -> None:
    """The deepest layer, which plans freeze."""
    layers = (m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer))
    next(layers).compile(backend="aot_eager")


def scaled(trainer: Any) -> None:
    scaled_as_on_gpus(trainer.accelerator)


def with_a_second(trainer: Any) -> None:
    """An adapter that is there, and does not train."""
    pairs = LoraConfig(r=3, target_modules="all-linear")
    if isinstance(trainer.model, PeftModel):
        trainer.model.add_adapter("other", pairs)
    else:  # of sentence-transformers, which makes it the active one
        trainer.model.add_adapter(pairs, "other")
        trainer.model.set_adapter("default")


Change = Callable[[Any], None]
PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
AGAIN = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
FEATURES: dict[str, tuple[dict[str, Any], Change]] = {
    "freezing": ({}, lambda _: None),
    "accumulation-clipping": (PARTS | {"max_grad_norm": 0.01}, lambda _: None),
    "bf16-checkpointing": (AGAIN | {"bf16": True}, lambda _: None),
    "fp16": ({"fp16": True}, scaled),
    "compiled": ({}, compiled),
    "second": ({}, with_a_second),
    "packing": (
        {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
        lambda _: None,
    ),
}
OF_ALL = ("accumulation-clipping", "bf16-checkpointing", "fp16", "compiled")
NAMES = ("sft", "sft-lora", "dpo", "sentences")


def pairs(name: str, **how: Any) -> tuple[Any, dict[str, Any]]:
    """A trainer of LoRA pairs."""
    task = None if name == "sentences" else "CAUSAL_LM"
    config = LoraConfig(r=2, target_modules="all-linear", task_type=task, **how)
    return TRAINERS[name][0], {"peft_config": config}


KINDS = {"lora": {}, "dora-rslora": {"use_dora": True, "use_rslora": True}}
ADAPTED = {
    f"{name}-{kind}": pairs(name, **how)
    for name in ("sft", "dpo", "sentences")
    for kind, how in KINDS.items()
}
CASES = [(name, feature) for name in NAMES for feature in OF_ALL]
CASES += [(name, "freezing") for name in ADAPTED if name not in NAMES]
CASES += [(f"{name}-lora", "second") for name in ("sft", "dpo", "sentences")]
CASES += [("sft-lora", "packing")]


def trainer_of(
    name: str, folder: Path, callback: TrainerCallback, run: str = "run", **changed: Any
) -> Any:
    make, given = ADAPTED.get(name) or TRAINERS[name]
    common = {"gradient_checkpointing": False, "save_strategy": "no", "learning_rate": RATE}
    common |= {"max_steps": STEPS, "logging_strategy": "no"}
    return make(folder / run, callback, **given | common | changed)


def trained(name: str, feature: str, folder: Path, callback: TrainerCallback) -> Any:
    settings, change = FEATURES[feature]
    trainer = trainer_of(name, folder, callback, **settings)
    change(trainer)
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@pytest.mark.parametrize(("name", "feature"), CASES, ids=[f"{n}-{f}" for n, f in CASES])
def test_it_is_the_run_that_is_frozen_by_hand(name: str, feature: str, tmp_path: Path) -> None:
    check(name, feature, tmp_path)


def check(name: str, feature: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    callback = Plans()
    ours = trained(name, feature, tmp_path, callback)
    guide = callback.guide
    assert guide is not None
    assert len(set(callback.seen)) == 3
    by_hand = ByHand(guide.components, callback.seen)
    theirs = trained(name, "freezing" if feature == "compiled" else feature, tmp_path, by_hand)
    scores = guide.error_map.history.column("score")
    torch.testing.assert_close(
        torch.from_numpy(scores), torch.tensor(by_hand.norms), rtol=1e-5, atol=0, equal_nan=True
    )
    expected, found = values(theirs.model), values(ours.model)
    for weight in {piece.parameter for c in guide.components for piece in c.slices}:
        near = {"rtol": 0, "atol": 1e-5 if feature == "compiled" else 0}
        torch.testing.assert_close(found[weight], expected[weight], **near)


def second_highest(situation: Situation) -> Tensor:
    """Freezes a layer through which gradients pass, at every other decision."""
    scale = torch.ones_like(situation.error)
    scale[-2] = float(situation.step // 2 % 2 == 0)
    return scale


def test_adapters_that_a_reference_switches_stay_frozen_where_layers_are_recomputed(
    tmp_path: Path,
) -> None:
    """DPO's reference runs between the forward and the backward pass of the model."""
    config = Config(policy=Policy(second_highest, uses_error=False, freezes=True), every=2)
    theirs = trainer_of("dpo-lora", tmp_path, RGFTCallback(config))
    ours = trainer_of("dpo-lora", tmp_path, callback := RGFTCallback(config), **AGAIN)
    for trainer in (theirs, ours):
        trainer.train()
    assert callback.guide is not None
    assert not all(callback.guide.error_map.history.column("lr_scale").ravel())
    for weight, value in values(theirs.model).items():
        torch.testing.assert_close(values(ours.model)[weight], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_reentrant_checkpointing_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    again = AGAIN | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = trainer_of(name, tmp_path, Plans(), **again)
    with pytest.raises(InputError, match="freezing would save nothing"):
        trainer.train()


# the steps of pairs are cheaper than those of full fine-tuning, which the budget is counted in
@pytest.mark.filterwarnings("ignore:training ended in the middle of a stage")
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_that_it_finds(name: str, tmp_path: Path) -> None:
    callback = RGFTCallback(Config(every=2), budget="auto")
    trainer = trainer_of(name, tmp_path, callback, max_steps=20)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 10_000
    trainer.train()
    assert callback.spending is not None
    stages = callback.spending.stages
    seen = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(stages) > 2
    assert [stage.validation for stage in stages] == seen[: len(stages)]
    assert [s.share for s in stages] == pytest.approx(STAGES[: len(stages)], abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_with_and_without_us(name: str, tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3}
    folder = tmp_path / "run"
    plain = trainer_of(name, tmp_path, TrainerCallback(), **saved)
    plain.train()
    callback = Plans()
    with pytest.warns(RuntimeWarning, match="step 3 was written without"):
        ours = trainer_of(name, tmp_path, callback, **saved)
        ours.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert len(callback.seen) == STEPS - 3
    assert not same_state(values(ours.model), values(plain.model))
    alone = trainer_of(name, tmp_path, TrainerCallback(), max_steps=STEPS + 1)
    alone.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
    assert alone.state.global_step == STEPS + 1
    for weight, value in values(alone.model).items():  # it went on from ours
        torch.testing.assert_close(value, values(ours.model)[weight], rtol=0, atol=2 * RATE)


# -- the prefix cache -------------------------------------------------------------------------


class Numbered:
    """A collator that numbers the rows of a batch; DPO's has those chosen before those rejected."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner, self._pairs = inner, name.startswith("dpo")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._inner([{k: v for k, v in row.items() if k != "sample_ids"} for row in rows])
        ids = torch.tensor([row["sample_ids"] for row in rows])
        batch["sample_ids"] = torch.cat([2 * ids, 2 * ids + 1]) if self._pairs else ids
        return dict(batch)


def late(situation: Situation) -> Tensor:
    """Freezes the deepest two once pairs have moved."""
    scale = torch.ones_like(situation.error)
    scale[: 2 * (situation.step > 3)] = 0.0
    return scale


def cached(name: str, folder: Path, storage: Storage | None) -> tuple[Any, RGFTCallback]:
    callback = RGFTCallback(
        Config(policy=Policy(late, uses_error=False), every=2), prefix_cache=storage
    )
    trainer = trainer_of(name, folder, callback, max_steps=20, remove_unused_columns=False)
    data = trainer.train_dataset
    if storage is not None and name != "sentences":  # it would take the numbers for texts
        trainer.train_dataset = data.add_column("sample_ids", list(range(len(data))))
        trainer.data_collator = Numbered(trainer.data_collator, name)
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize("name", ["sft", "sft-lora", "dpo-lora"])
def test_prefix_cache(name: str, tmp_path: Path) -> None:
    """DPO's reference of an adapter is the model without, and what it runs is not to be stored."""
    ours, callback = cached(name, tmp_path, Storage())
    theirs, _ = cached(name, tmp_path, None)
    assert callback.cache is not None
    assert callback.cache.counts["hits"] > 0
    for weight, value in values(theirs.model).items():
        torch.testing.assert_close(values(ours.model)[weight], value, rtol=0, atol=1e-6)


def test_a_prefix_cache_that_is_of_no_use_says_so(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="no 'sample_ids': the prefix cache spares it nothing"):
        cached("sentences", tmp_path, Storage())
