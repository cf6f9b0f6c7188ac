"""What a tracker gets of a guided run: the map, the multipliers, the budget, and the heatmap."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rgft.guide import Guide
from rgft.spending import Spending

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE = "rgft/error_map"


def scalars(guide: Guide, spending: Spending | None = None) -> dict[str, float]:
    """Error and multiplier of every component, the share of components that train, the budget.

    The map comes to the host: ask once in a while, as often as something is logged.
    """
    errors = guide.error_map.values.tolist()
    plan = guide.plan
    logs = {"rgft/trained": sum(plan.trained) / len(plan.trained)}
    for component, error, scale in zip(guide.components, errors, plan.lr_scale, strict=True):
        logs[f"rgft/error/{component.name}"] = float(error)
        logs[f"rgft/lr_scale/{component.name}"] = float(scale)
    if spending is not None:
        logs["rgft/budget_spent"] = spending.progress
    return logs


def figure(guide: Guide) -> Figure:
    """The error map over steps as a matplotlib figure that no window system holds on to."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra that the core does without

    history = guide.error_map.history
    drawing = Figure(figsize=(8, 1 + 0.25 * len(guide.components)), layout="constrained")
    axes = drawing.subplots()
    mesh = axes.imshow(
        history.column("error").T, aspect="auto", origin="lower", interpolation="nearest"
    )
    names = [component.name for component in guide.components]
    axes.set_yticks(range(len(names)), names, fontsize="small")
    kept = history.steps
    ticks = range(0, len(kept), max(1, len(kept) // 8))
    axes.set_xticks(ticks, [str(kept[i]) for i in ticks])
    axes.set_xlabel("optimizer step")
    drawing.colorbar(mesh, label="error map")
    return drawing


def to_tensorboard(writer: Any, drawing: Figure, step: int) -> None:
    """Show the figure in a `SummaryWriter`."""
    import numpy as np  # noqa: PLC0415

    writer.add_image(IMAGE, np.asarray(_picture(drawing)), step, dataformats="HWC")


def to_wandb(run: Any, drawing: Figure, step: int) -> None:
    """Show the figure in a run of `wandb.init`."""
    import wandb  # noqa: PLC0415

    del step  # the run counts by itself
    run.log({IMAGE: wandb.Image(_picture(drawing))})


def to_trackio(run: Any, drawing: Figure, step: int) -> None:
    """Show the figure in a run of `trackio.init`."""
    import trackio  # noqa: PLC0415

    run.log({IMAGE: trackio.Image(_picture(drawing))}, step=step)


def to_mlflow(module: Any, drawing: Figure, step: int) -> None:
    """Show the figure in the active run of the module `mlflow`."""
    module.log_figure(drawing, f"{IMAGE}_{step}.png")


def _picture(drawing: Figure) -> Any:
    """The figure as a picture of Pillow's, without the window system that pyplot looks for."""
    from PIL import Image  # noqa: PLC0415

    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


SHOW: dict[str, Callable[[Any, Any, int], None]] = {
    "tensorboard": to_tensorboard,
    "wandb": to_wandb,
    "trackio": to_trackio,
    "mlflow": to_mlflow,
}
"""How to show the figure, by tracker."""
