"""Checkpoints of sharded models go on, on as many processes as there are."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rgft import Guide
from rgft.errors import InputError
from rgft.integrations.torch_distributed import load_checkpoint, save_checkpoint
from runs import warm_up
from test_processes import ROWS, STEPS, assert_like_one, config, ddp, sharded, share, whole
from tiny import bert, bert_loss, tokens
from workers import begin, launch, wait

KINDS = {"one": lambda model: model, "ddp": ddp, "fsdp2": sharded}
HALF = STEPS // 2 + 1  # between two decisions


def train(kind: str, folder: Path, part: str) -> dict[str, Any]:
    """The first half of a run, its second, or both; bias-free embeddings never train."""
    model = bert()
    trained = KINDS[kind](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guide = Guide(trained, optimizer, config(frozen_below=1))
    batches = tokens(STEPS, rows=ROWS)
    if part == "second":
        assert load_checkpoint(folder, trained, optimizer, guide) == {"done": HALF}
        assert guide.step == HALF
        batches = batches[HALF:]
    elif part == "first":
        batches = batches[:HALF]
    plans = []
    for batch in batches:
        bert_loss(trained, share(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        plans.append(guide.plan.lr_scale)
    if part == "first":
        save_checkpoint(folder, trained, optimizer, guide, {"done": HALF})
    guide.close()
    weights = {name: whole(p) for name, p in model.named_parameters()}
    states = sorted(n for n, p in model.named_parameters() if p in optimizer.state)
    found = {"plans": plans, "error": guide.error_map.values, "weights": weights}
    return {**found, "states": states}


@pytest.mark.parametrize(
    ("before", "after"),
    [(("fsdp2", 4), ("fsdp2", 2)), (("fsdp2", 2), ("one", 1)), (("ddp", 2), ("fsdp2", 2))],
    ids=["fsdp2-4-to-2", "fsdp2-2-to-1", "ddp-to-fsdp2"],
)
def test_a_run_goes_on_on_another_number_of_processes(
    before: tuple[str, int], after: tuple[str, int], tmp_path: Path
) -> None:
    full = train("one", tmp_path, "both")
    folder = tmp_path / "checkpoint"
    launch(before[1], train, tmp_path / "a", before[0], folder, "first")
    if after[0] == "one":
        ends = [train("one", folder, "second")]
    else:
        ends = launch(after[1], train, tmp_path / "b", after[0], folder, "second")
    for end in ends:
        assert end["states"] == full["states"]  # none was made for what is never stepped
        assert_like_one(end, {**full, "plans": full["plans"][HALF:]})


def test_what_is_no_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    guide = Guide(model, optimizer)
    with pytest.raises(InputError, match="no whole checkpoint"):
        load_checkpoint(tmp_path, model, optimizer, guide)
    save_checkpoint(tmp_path / "c", model, optimizer, guide)
    (tmp_path / "c" / ".metadata").unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        load_checkpoint(tmp_path / "c", model, optimizer, guide)
    save_checkpoint(tmp_path / "d", model, optimizer, guide)
    other = nn.Linear(2, 2, bias=False)
    other.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    another = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"another model: it has no 'model\.extra'"):
        load_checkpoint(tmp_path / "d", other, another, Guide(other, another))


def goes_on(folder: Path, ready: Path) -> None:
    """A checkpoint, and then steps without end."""
    model = bert()
    trained = sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guide = Guide(trained, optimizer, config(frozen_below=1))
    for step, batch in enumerate(itertools.cycle(tokens(STEPS, rows=ROWS))):
        if step == HALF:
            save_checkpoint(folder, trained, optimizer, guide, {"done": HALF})
            ready.touch()
        bert_loss(trained, share(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_killed_process_ends_all_and_the_run_goes_on_with_fewer(tmp_path: Path) -> None:
    folder, ready = tmp_path / "checkpoint", tmp_path / "ready"
    warm_up()
    processes = begin(2, goes_on, tmp_path / "a", folder, ready)
    while not ready.exists():
        assert all(p.exitcode is None for p in processes)
        time.sleep(0.05)
    processes[1].kill()
    wait(processes, 60)
    assert [p.exitcode for p in processes] == [1, -9]
    assert "Connection " in (tmp_path / "a" / "0.error").read_text()
    end = train("one", folder, "second")
    assert_like_one(
        end, {**(full := train("one", tmp_path, "both")), "plans": full["plans"][HALF:]}
    )
