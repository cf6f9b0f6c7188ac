"""Trackers get the map: real libraries, offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loops import trainer_of
from rgft import Budget, Config, FlopMeter, Guide, Spending
from rgft.errors import InputError
from rgft.integrations import trackers
from rgft.integrations.trainer_trackers import follow
from rgft.integrations.transformers import RGFTCallback
from tiny import bert, fit, mlp, mlp_batches, squared_error

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


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Trackio writes: it asks once, when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        import trackio  # noqa: PLC0415

        assert folder == trackio.TRACKIO_DIR
        yield folder


def trackio_logs(project: str) -> list[dict[str, Any]]:
    """What Trackio has of the one run of a project."""
    from trackio.sqlite_storage import SQLiteStorage  # noqa: PLC0415

    (run,) = SQLiteStorage.get_runs(project)
    return list(SQLiteStorage.get_logs(project, run))


def test_trackio(guided: tuple[Guide, Spending], trackio_folder: Path) -> None:
    import trackio  # noqa: PLC0415

    guide, _ = guided
    run: Any = trackio.init(project="rgft", name="run", embed=False)
    run.log(trackers.scalars(guide), step=guide.step)
    trackers.SHOW["trackio"](run, trackers.figure(guide), guide.step)
    trackio.finish()
    numbers, image = trackio_logs("rgft")
    assert {k: numbers[k] for k in (*NAMES, "rgft/trained")} == trackers.scalars(guide)
    assert numbers["step"] == image["step"] == guide.step == 6
    assert (trackio_folder / "media" / image[trackers.IMAGE]["file_path"]).stat().st_size > 1000


# -- under the Trainer ------------------------------------------------------------------------


def train(tracker: str, folder: Path) -> RGFTCallback:
    """A guided Trainer that reports to `tracker` at every second of its 6 steps or so."""
    callback = RGFTCallback(Config(every=2), budget=0.5)
    settings = {"report_to": [tracker], "logging_steps": 2, "save_strategy": "no"}
    trainer = trainer_of(folder / "out", [callback], bert(2), **settings)
    follow(trainer, callback)
    trainer.train()
    return callback


def expected(callback: RGFTCallback) -> dict[str, float]:
    assert callback.guide is not None
    return trackers.scalars(callback.guide, callback.spending)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    import mlflow  # noqa: PLC0415

    callback = train("mlflow", tmp_path)
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert callback.guide is not None
    for name in expected(callback):
        history = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in history] == list(range(2, callback.guide.step + 1, 2))
    assert callback.guide.step % 2 == 0  # the last step is one of those that are logged
    assert {k: run.data.metrics[k] for k in expected(callback)} == expected(callback)
    assert run.data.metrics["rgft/budget_spent"] > 0.5
    (folder,) = client.list_artifacts(run.info.run_id)
    (image,) = client.list_artifacts(run.info.run_id, folder.path)
    assert image.path == f"rgft/error_map_{callback.guide.step}.png" and image.file_size > 1000


def test_tensorboard_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    callback = train("tensorboard", tmp_path)
    (events,) = (EventAccumulator(str(p)).Reload() for p in (tmp_path / "logs").rglob("events*"))
    assert set(events.Tags()["scalars"]) >= {f"train/{name}" for name in expected(callback)}
    assert len(events.Images(trackers.IMAGE)) == 1


def test_wandb_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb  # noqa: PLC0415

    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # it reads the environment once
    callback = train("wandb", tmp_path)
    assert wandb.run is not None
    seen = dict(wandb.run.summary)
    wandb.run.finish()
    assert set(seen) >= {f"train/{name}" for name in expected(callback)}
    assert list(tmp_path.rglob("error_map*.png"))


def test_trackio_of_the_trainer(tmp_path: Path, trackio_folder: Path) -> None:
    callback = train("trackio", tmp_path)
    *numbers, _, image = trackio_logs("huggingface")
    assert [one["train/global_step"] for one in numbers] == [2, 4, 6]
    last = {k: numbers[-1][f"train/{k}"] for k in expected(callback)}
    assert last == expected(callback)
    assert (trackio_folder / "media" / image[trackers.IMAGE]["file_path"]).stat().st_size > 1000


def test_what_cannot_follow_is_refused(tmp_path: Path) -> None:
    callback = RGFTCallback(Config(every=2))
    silent = trainer_of(tmp_path / "silent", [callback], bert(2), report_to=[])
    with pytest.raises(InputError, match="reports to none of mlflow, tensorboard"):
        follow(silent, callback)
    other = trainer_of(tmp_path / "other", [], bert(2), report_to=["tensorboard"])
    with pytest.raises(InputError, match="not among the Trainer's"):
        follow(other, callback)
