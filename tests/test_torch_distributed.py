"""Checkpoints of sharded models go on, on as many processes as there are."""

from __future__ import annotations

import itertools
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rgft import Guide
from rgft.errors import InputError
from rgft.integrations.torch_distributed import load_checkpoint, save_checkpoint
from runs import warm_up
from test_processes import ROWS, STEPS, assert_like_one, config, ddp, sharded, share, whole
from tiny import bert, bert_loss, same_state, tokens
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


Parts = tuple[nn.Module, torch.optim.Optimizer, Guide]


def parts(model: nn.Module | None = None, groups: int = 1) -> Parts:
    """Something to save, one step on, its parameters dealt out to groups."""
    model = model or nn.Linear(2, 2)
    own = list(model.parameters())
    dealt = [{"params": own[i::groups]} for i in range(groups)]
    optimizer = torch.optim.SGD(dealt, lr=0.1, momentum=0.9)
    guide = Guide(model, optimizer)
    sum(p.sum() for p in own).backward()
    optimizer.step()
    return model, optimizer, guide


def test_what_is_no_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    given = parts()
    with pytest.raises(InputError, match="no whole checkpoint"):
        load_checkpoint(tmp_path, *given)
    save_checkpoint(tmp_path / "c", *given)
    (tmp_path / "c" / ".metadata").unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        load_checkpoint(tmp_path / "c", *given)


class Longer(nn.Linear):
    """With one parameter more."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.extra = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("saved", "model", "groups", "message"),
    [
        (nn.Linear, Longer, 1, r"has no 'model\.extra', which the model has"),
        (Longer, nn.Linear, 1, r"has 'model\.extra', which the model has not"),
        (nn.Linear, lambda *_: nn.Linear(3, 2), 1, r"'model\.weight' is \(2, 2\), here \(2, 3\)"),
        (nn.Linear, nn.Linear, 2, "another optimizer: parameter groups are 1, here 2"),
    ],
    ids=["fewer", "more", "shapes", "groups"],
)
def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(
    saved: Any, model: Any, groups: int, message: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", *parts(saved(*(() if saved is Longer else (2, 2)))))
    given = parts(model(*(() if model is Longer else (2, 2))), groups)
    before = {name: value.clone() for name, value in given[0].state_dict().items()}
    with pytest.raises(InputError, match=message) as refused:
        load_checkpoint(tmp_path / "c", *given)
    assert "\n" not in str(refused.value)
    assert same_state(given[0].state_dict(), before)


def tied(*, together: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if together:
        model[1].weight = model[0].weight
    return model


def test_a_checkpoint_of_weights_that_were_not_tied_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", *parts(tied(together=False)))
    with pytest.raises(InputError, match=r"a state of '1\.weight', which is no parameter"):
        load_checkpoint(tmp_path / "c", *parts(tied(together=True)))


def test_a_checkpoint_of_a_guide_set_otherwise_changes_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", *parts())
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = Guide(model, optimizer, config())
    with pytest.raises(InputError, match="load it with the settings it was saved with"):
        load_checkpoint(tmp_path / "c", model, optimizer, other)
    assert same_state(model.state_dict(), before)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_reading_never_runs_code_from_the_metadata(tmp_path: Path) -> None:
    given = parts()
    save_checkpoint(tmp_path / "c", *given)
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "gone-off")))
    with pytest.raises(InputError, match=r"mkdir.*no checkpoint of save_checkpoint has"):
        load_checkpoint(tmp_path / "c", *given)
    assert not (tmp_path / "gone-off").exists()


def test_reading_never_runs_code_from_a_part_said_to_be_no_tensor(tmp_path: Path) -> None:
    """torch unpickles those without restrictions."""
    given = parts()
    save_checkpoint(tmp_path / "c", *given)
    path = tmp_path / "c" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["model.bias"] = BytesStorageMetadata()
    (info,) = [v for k, v in metadata.storage_data.items() if k.fqn == "model.bias"]
    bomb = pickle.dumps(Bomb(tmp_path / "gone-off"))
    info.relative_path, info.offset, info.length = "bomb", 0, len(bomb)
    (tmp_path / "c" / "bomb").write_bytes(bomb)
    metadata.storage_data = {  # whole values have no offset
        type(k)(k.fqn) if k.fqn == "model.bias" else k: v for k, v in metadata.storage_data.items()
    }
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"BytesStorageMetadata, which no checkpoint"):
        load_checkpoint(tmp_path / "c", *given)
    assert not (tmp_path / "gone-off").exists()


def test_reading_never_unpickles_without_restrictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = parts()
    save_checkpoint(tmp_path / "c", *given, {"done": 3})
    monkeypatch.delattr(pickle, "load")
    assert load_checkpoint(tmp_path / "c", *given) == {"done": 3}


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    given = parts()
    for name in (".metadata", "rest.pt"):
        save_checkpoint(tmp_path / name, *given)
        path = tmp_path / name / name
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(InputError, match="damaged, or no checkpoint of save_checkpoint"):
            load_checkpoint(tmp_path / name, *given)


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


def saves_again(folder: Path) -> None:
    """A whole checkpoint, and then one that process 1 does not live to write its part of."""
    model = bert()
    trained = sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guide = Guide(trained, optimizer, config(frozen_below=1))
    save_checkpoint(folder, trained, optimizer, guide)
    save_checkpoint(folder, trained, optimizer, guide, {"again": True})  # no remark of torch's
    dist.barrier()
    if dist.get_rank() == 1:
        torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data = die
    save_checkpoint(folder, trained, optimizer, guide)


def die(*given: Any) -> None:
    os._exit(9)


def test_a_save_into_the_same_folder_that_is_cut_off_leaves_no_mixture(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    warm_up()
    processes = begin(2, saves_again, tmp_path / "a", folder)
    wait(processes, 60)
    assert processes[1].exitcode == 9
    assert list(folder.glob("*.distcp"))
    with pytest.raises(InputError, match="no whole checkpoint"):
        load_checkpoint(folder, *parts(bert()))
