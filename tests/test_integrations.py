"""Every integration makes of the same data the same map, the same plans and the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from loops import (
    CONFIG,
    LOOPS,
    STEPS,
    Module,
    Outcome,
    hugging_face,
    lightning_loop,
    loader,
    optimizer_of,
    plain,
    rows,
    trainer_of,
)
from rgft import Config, Guide, InputError
from rgft.integrations.lightning import RGFTCallback as LightningCallback
from rgft.integrations.transformers import RGFTCallback as TrainerCallback
from tiny import bert, bert_with_lora, hooks, same_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    # Lightning asks torch by a name that goes out of use
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]
OTHERS = [name for name in LOOPS if name != "plain"]


def close(ours: Outcome, theirs: Outcome) -> None:
    assert ours.steps == theirs.steps
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-7)
    assert torch.equal(ours.plans, theirs.plans)
    assert (ours.plans == 0).any()  # something was frozen
    for name, value in ours.weights.items():
        torch.testing.assert_close(value, theirs.weights[name], rtol=0, atol=1e-6)


def identical(ours: Outcome, theirs: Outcome) -> None:
    assert ours.steps == theirs.steps
    assert same_state(ours.weights, theirs.weights)
    assert torch.equal(ours.plans, theirs.plans)
    assert torch.equal(ours.scores, theirs.scores)


@pytest.mark.parametrize("name", OTHERS)
def test_same_map_plans_and_weights(name: str, tmp_path: Path) -> None:
    close(LOOPS[name](tmp_path), plain(tmp_path))


@pytest.mark.parametrize("name", OTHERS)
def test_accumulation(name: str, tmp_path: Path) -> None:
    close(LOOPS[name](tmp_path, accumulation=3), plain(tmp_path, accumulation=3))


@pytest.mark.parametrize("name", OTHERS)
def test_lora(name: str, tmp_path: Path) -> None:
    close(LOOPS[name](tmp_path, make=bert_with_lora), plain(tmp_path, make=bert_with_lora))


@pytest.mark.parametrize("name", LOOPS)
def test_stop_and_resume(name: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = LOOPS[name](tmp_path / "whole")
    LOOPS[name](tmp_path / "parts", stop=5)
    identical(LOOPS[name](tmp_path / "parts", resume=True), whole)


@pytest.mark.parametrize("name", OTHERS)
def test_a_budget(name: str, tmp_path: Path) -> None:
    ours = LOOPS[name](tmp_path, budget=0.5)
    theirs = plain(tmp_path, budget=0.5)
    assert theirs.steps < 12
    close(ours, theirs)


def test_another_budget_on_resume_is_said_and_so_is_none(tmp_path: Path) -> None:
    with warnings.catch_warnings():  # of a run that someone stops, nothing is to be said
        warnings.simplefilter("error", RuntimeWarning)
        hugging_face(tmp_path, stop=5, budget=0.8)
    with pytest.warns(RuntimeWarning, match=r"the budget is 0\.9 and was 0\.8"):
        hugging_face(tmp_path, resume=True, budget=0.9)
    with pytest.warns(RuntimeWarning, match="of a run with a budget, and now there is none"):
        hugging_face(tmp_path, resume=True)


@pytest.mark.parametrize("loop", [hugging_face, lightning_loop], ids=["trainer", "lightning"])
def test_a_checkpoint_written_without_us(loop, tmp_path: Path) -> None:
    loop(tmp_path, stop=5, guided=False)
    with pytest.warns(RuntimeWarning, match="step 5 was written without") as caught:
        ours = loop(tmp_path, resume=True)
    (file,) = {w.filename for w in caught if "step 5" in str(w.message)}
    assert Path(file).parent == Path(__file__).parent  # where the frameworks were called from
    assert ours.steps == 7
    with pytest.raises(InputError, match="what is spent of it is not known"):
        loop(tmp_path, resume=True, budget=0.5)


@pytest.mark.parametrize("loop", [hugging_face, lightning_loop], ids=["trainer", "lightning"])
def test_our_checkpoint_goes_on_without_us(loop, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    loop(tmp_path, stop=5)
    ours = loop(tmp_path, resume=True, guided=False)
    assert all(value.isfinite().all() for value in ours.weights.values())
    theirs = loop(tmp_path / "plain", guided=False)
    assert ours.weights.keys() == theirs.weights.keys()
    assert not same_state(ours.weights, theirs.weights)  # it went on from what we had trained


def test_a_trainer_that_is_made_after_a_guided_one_trains_all(tmp_path: Path) -> None:
    """The optimizer that it makes takes only what requires a gradient at that moment."""
    model = bert()
    for _ in range(2):
        callback = TrainerCallback(Config(policy="suffix", top=0.4, every=2))
        trainer = trainer_of(tmp_path, [callback], model, max_steps=3, save_strategy="no")
        trainer.optimizer = trainer.lr_scheduler = None  # it makes its own
        trainer.train()
        held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
        assert held == set(model.parameters())
        assert callback.guide is not None and not all(callback.guide.plan.trained)


def test_lightning_refuses_auto() -> None:
    with pytest.raises(InputError, match="give a share or a time"):
        LightningCallback(Config(), budget="auto")


@pytest.mark.parametrize("written", [False, True], ids=["without", "with"])
def test_accelerate_refuses_a_state_with_other_parts(written: bool, tmp_path: Path) -> None:
    """It counts what is registered: a state without a guide, or one with it, fits only its like."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    model = bert(1)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    guide = Guide(accelerator.unwrap_model(model), optimizer, CONFIG)
    if written:
        accelerator.register_for_checkpointing(guide)
    accelerator.save_state(str(tmp_path / "state"))
    if written:
        accelerator._custom_objects.clear()
    else:
        accelerator.register_for_checkpointing(guide)
    with pytest.raises(RuntimeError, match="custom checkpoints"):
        accelerator.load_state(str(tmp_path / "state"))


class Interrupted(Module):
    """Fails once a part of the network is frozen."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if not all(p.requires_grad for p in self.network.parameters()):
            raise FloatingPointError("enough")
        return super().training_step(batch, index)


def test_lightning_leaves_the_network_as_it_was_when_training_fails() -> None:
    module = Interrupted(bert())
    before = hooks(module)
    callback = LightningCallback(CONFIG, budget=1.0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(FloatingPointError, match="enough"):
        trainer.fit(module, loader(rows()))
    assert callback.guide is not None and not all(callback.guide.plan.trained)
    assert all(p.requires_grad for p in module.network.parameters())
    assert hooks(module) == before
    assert not callback.guide.optimizer._optimizer_step_pre_hooks
