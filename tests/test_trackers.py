"""Trackers get the map: real libraries, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rgft import Budget, Config, FlopMeter, Guide, Spending
from rgft.integrations import trackers
from tiny import fit, mlp, mlp_batches, squared_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NAMES = {f"rgft/{what}/{name}" for what in ("error", "lr_scale") for name in ("0", "2", "4")}


@pytest.fixture
def guided() -> tuple[Guide, Spending]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    spending = Spending(FlopMeter(model), Budget(share=1.0), batches=12)
    guide = Guide(model, optimizer, Config(every=2), spending=spending)
    list(fit(model, optimizer, mlp_batches(6), squared_error))
    return guide, spending


def test_scalars_are_the_map_the_plan_and_the_budget(guided: tuple[Guide, Spending]) -> None:
    guide, spending = guided
    logs = trackers.scalars(guide, spending)
    assert set(logs) == NAMES | {"rgft/trained", "rgft/budget_spent"}
    assert logs["rgft/error/2"] == pytest.approx(guide.error_map.values[1].item())
    assert logs["rgft/lr_scale/4"] == guide.plan.lr_scale[2]
    assert logs["rgft/budget_spent"] == pytest.approx(0.5)


def test_tensorboard(guided: tuple[Guide, Spending], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    guide, _ = guided
    with SummaryWriter(str(tmp_path)) as writer:
        for name, value in trackers.scalars(guide).items():
            writer.add_scalar(name, value, guide.step)
        trackers.SHOW["tensorboard"](writer, trackers.figure(guide), guide.step)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) >= NAMES
    (image,) = events.Images(trackers.IMAGE)
    assert image.step == 6 and image.width > 100


def test_wandb_offline(
    guided: tuple[Guide, Spending], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb  # noqa: PLC0415

    monkeypatch.setenv("WANDB_SILENT", "true")
    guide, _ = guided
    run = wandb.init(mode="offline", dir=str(tmp_path), project="rgft")
    run.log(trackers.scalars(guide))
    trackers.SHOW["wandb"](run, trackers.figure(guide), guide.step)
    run.finish()
    assert list(tmp_path.rglob("*.wandb"))
    assert list(tmp_path.rglob("error_map*.png"))


def test_trackio(
    guided: tuple[Guide, Spending], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    import trackio  # noqa: PLC0415

    guide, _ = guided
    run: Any = trackio.init(project="rgft", name="run", embed=False)
    run.log(trackers.scalars(guide), step=guide.step)
    trackers.SHOW["trackio"](run, trackers.figure(guide), guide.step)
    trackio.finish()
    assert list(tmp_path.rglob("*.png"))
