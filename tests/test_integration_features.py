"""What loops do besides stepping, under every integration: it ends as the plain loop does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

import loops
import test_loss_watch
from loops import LOOPS, RATE, STEPS, Outcome, optimizer_of, plain
from rgft import Config, Guide, InputError
from rgft.execution.prefix_cache import PrefixCache
from rgft.execution.stored_samples import Storage
from test_integrations import OTHERS, close, pytestmark  # noqa: F401 - the warnings to ignore
from test_loss_watch import EPOCHS, SAMPLES
from test_training_features import adapted, with_a_second
from tiny import bert, checkpoint_activations, values


def checkpointed(use_reentrant: bool = False) -> nn.Module:
    """As transformers does it: embeddings then pass gradients, which defeats truncation."""
    model: Any = bert()
    checkpoint_activations(model, use_reentrant=use_reentrant)
    return model


class Watched:
    """Makes models, and notes whether the embeddings' output requires a gradient in training."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make
        self.seen: list[bool] = []

    def __call__(self) -> nn.Module:
        model: Any = self._make()

        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.seen.append(output.requires_grad)

        model.bert.embeddings.register_forward_hook(note)
        return model


def apart(ours: Outcome, theirs: Outcome) -> bool:
    return not torch.allclose(ours.scores, theirs.scores, rtol=1e-3, atol=0, equal_nan=True)


def test_the_clipping_that_all_loops_do_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped = plain(tmp_path)
    monkeypatch.setattr(loops, "CLIP", 1e9)
    assert apart(plain(tmp_path), clipped)


@pytest.mark.parametrize("name", OTHERS)
def test_bf16(name: str, tmp_path: Path) -> None:
    theirs = plain(tmp_path, bf16=True)
    assert apart(theirs, plain(tmp_path))
    ours = LOOPS[name](tmp_path, bf16=True)
    assert torch.equal(ours.plans, theirs.plans)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6, equal_nan=True)
    for weight, value in ours.weights.items():
        torch.testing.assert_close(value, theirs.weights[weight], rtol=0, atol=1e-5)


def test_fp16_scores_are_unscaled(tmp_path: Path) -> None:
    full, half = plain(tmp_path), plain(tmp_path, fp16=True)
    assert not torch.equal(half.scores, full.scores)
    torch.testing.assert_close(half.scores, full.scores, rtol=1e-2, atol=1e-4)


CASES = [("accelerate", False), ("accelerate", True), ("lightning", False)]
CASES += [("trainer", False), ("trainer", True)]  # Lightning does not clip for fused optimizers


# of loops that go on with their schedule after an overflow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(("name", "fused"), CASES, ids=[n + "-fused" * f for n, f in CASES])
def test_fp16(name: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradient scaling, whose first steps overflow; loops differ in what schedules do then."""
    monkeypatch.setattr(loops, "SCALE", 2.0**20)
    monkeypatch.setattr(loops, "linear", lambda step: 1.0)
    monkeypatch.setattr(loops, "optimizer_of", lambda m: AdamW(m.parameters(), RATE, fused=fused))
    theirs = plain(tmp_path, fp16=True)
    assert theirs.scores[0].eq(-1).all() if fused else theirs.steps < STEPS  # there were overflows
    close(LOOPS[name](tmp_path, fp16=True), theirs)


ADAPTED = {
    "dora": lambda: adapted("dora"),
    "rslora": lambda: adapted("rslora"),
    "second": with_a_second,
}


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = Config(granularity="lora", policy="top", top=0.4, every=2, warmup=2)
    monkeypatch.setattr(loops, "CONFIG", pairs)
    ours = LOOPS[name](tmp_path, make=ADAPTED[kind])
    close(ours, plain(tmp_path, make=ADAPTED[kind]))
    before = values(ADAPTED[kind]())
    moved = {weight for weight, value in ours.weights.items() if (value != before[weight]).any()}
    trained = {n for n in before if ("lora_" in n or "modules_to_save" in n) and ".other." not in n}
    assert moved == trained


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # the older name
@pytest.mark.parametrize("name", LOOPS)
def test_checkpointing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "CONFIG", Config(policy="suffix", top=0.4, every=2))
    make, without = Watched(checkpointed), Watched(bert)
    given: dict[str, Any] = {"make": make}
    if name == "trainer":
        make = given["make"] = Watched(bert)
        given |= {"gradient_checkpointing": True}
        given |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    ours = LOOPS[name](tmp_path, **given)
    close(ours, plain(tmp_path, make=without))
    assert make.seen == without.seen
    assert not all(without.seen)  # backward was truncated


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", LOOPS)
def test_reentrant_checkpointing_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    def make() -> nn.Module:
        model = checkpointed(use_reentrant=True)
        model.register_forward_hook(lambda *given: seen.append(given))
        return model

    given: dict[str, Any] = {"make": make}
    if name == "trainer":
        given |= {"gradient_checkpointing": True}
        given |= {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(InputError, match="freezing would save nothing"):
        LOOPS[name](tmp_path, **given)
    assert not seen


def test_reentrant_checkpointing_is_let_be_where_nothing_freezes() -> None:
    model = checkpointed(use_reentrant=True)
    Guide(model, optimizer_of(model), Config(policy="normalized-max", every=2)).close()


def compiled() -> nn.Module:
    model: Any = bert()
    for layer in model.bert.encoder.layer:
        layer.compile(backend="aot_eager")
    return model


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@pytest.mark.parametrize("name", LOOPS)
def test_compiled_blocks(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    theirs, ours = plain(tmp_path), LOOPS[name](tmp_path, make=compiled)
    assert torch.equal(ours.plans, theirs.plans)
    for weight, value in ours.weights.items():
        torch.testing.assert_close(value, theirs.weights[weight], rtol=0, atol=1e-5)


class Small(nn.Module):
    """A classifier that takes little time to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(60, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        hidden = self.embeddings(input_ids).mean(1) + 0 * attention_mask.sum()
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return {"loss": nn.functional.cross_entropy(self.classifier(hidden), labels)}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what dynamo imports
def test_a_trainer_that_compiles_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a budget: what is compiled is a wrapper around the model that is counted."""
    for name in ("BACKEND", "MODE"):  # the Trainer sets them for the whole process
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    torch._dynamo.reset()
    given: dict[str, Any] = {"make": Small, "budget": 0.5, "save_strategy": "no"}
    theirs = LOOPS["trainer"](tmp_path, **given)
    given |= {"torch_compile": True, "torch_compile_backend": "eager"}
    with pytest.warns(RuntimeWarning, match="compile its layers instead"):
        ours = LOOPS["trainer"](tmp_path, **given)
    close(ours, theirs)
    AcceleratorState._reset_state()  # what comes after would be compiled, too


# -- the prefix cache, over epochs ------------------------------------------------------------

FROZEN = Config(policy="normalized-max", every=2, frozen_below=2)
Counts = dict[str, int]


def batches(count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        yield from DataLoader(test_loss_watch.rows(), batch_size=test_loss_watch.BATCH)


def plain_cached(folder: Path, storage: Storage) -> tuple[nn.Module, Counts]:
    del folder
    model = bert()
    optimizer = optimizer_of(model)
    guide = Guide(model, optimizer, FROZEN)
    with PrefixCache(model, storage) as cache:
        for batch in batches(EPOCHS):
            cache.follow(guide.lowest)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    guide.close()
    return model, cache.counts


def accelerate_cached(folder: Path, storage: Storage) -> tuple[nn.Module, Counts]:
    del folder
    accelerator = Accelerator(cpu=True)
    model = bert()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    inner = accelerator.unwrap_model(model)
    guide = Guide(inner, optimizer, FROZEN)
    with PrefixCache(inner, storage) as cache:
        for batch in batches(EPOCHS):
            cache.follow(guide.lowest)
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    guide.close()
    return inner, cache.counts


def callback_cached(name: str) -> Callable[[Path, Storage], tuple[nn.Module, Counts]]:
    def run(folder: Path, storage: Storage) -> tuple[nn.Module, Counts]:
        loop, kind = test_loss_watch.LOOPS[name]
        model, callback = bert(), kind(FROZEN, prefix_cache=storage)
        loop(folder, callback, make=lambda: model)
        return model, callback.cache.counts

    return run


CACHED = {
    "plain": plain_cached,
    "accelerate": accelerate_cached,
    "trainer": callback_cached("trainer"),
    "lightning": callback_cached("lightning"),
}


def uncached(*, scheduled: bool) -> nn.Module:
    """Without a cache; the loops with callbacks clip, and have a schedule."""
    model = bert()
    optimizer = optimizer_of(model)
    guide = Guide(model, optimizer, FROZEN)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, loops.linear)
    for batch in batches(EPOCHS):
        batch.pop("sample_ids")
        model(**batch).loss.backward()
        if scheduled:
            nn.utils.clip_grad_norm_(model.parameters(), loops.CLIP)
        optimizer.step()
        if scheduled:
            scheduler.step()
        optimizer.zero_grad()
    guide.close()
    return model


@pytest.mark.parametrize("name", CACHED)
def test_prefix_cache(name: str, tmp_path: Path) -> None:
    ours, counts = CACHED[name](tmp_path, Storage())
    theirs = values(uncached(scheduled=name in test_loss_watch.LOOPS))
    assert counts["hits"] == (EPOCHS - 1) * SAMPLES
    for weight, value in values(ours).items():
        torch.testing.assert_close(value, theirs[weight], rtol=0, atol=1e-6)
