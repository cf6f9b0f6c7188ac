"""One forward pass of a model whose first layers do not run, or run and are noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rgft.execution.interception import Call, Evaluation, Interception
from rgft.execution.layer_output import LayerOutput, entering
from rgft.execution.prefix_batch import Samples, fill, split
from rgft.execution.stored_samples import Rows
from rgft.structure.layers import Named


@dataclass(slots=True)
class Forward:
    """What is to be done in a forward pass, and what came of it.

    Attributes:
        samples: The samples of the batch, if it names them.
        start: The first so many layers do not run.
        rows: Stored samples, if any layer does not run.
        computed: At the end, what the prefix puts out for each sample, on the host; None if it is
            stored for all.
        calls: How often the last layer of the prefix was called.
        failed: Why the layers cannot be cached.
        half: Whether layers compute in 16 bits.
    """

    samples: Samples | None
    start: int = 0
    rows: Rows = field(default_factory=dict)
    computed: list[Tensor] | None = None
    calls: int = 0
    failed: str | None = None
    half: bool = False
    evaluation: Evaluation = field(default_factory=Evaluation)
    wants_gradient: bool = False

    def assembled(self, device: torch.device) -> Tensor:
        """The samples stored at the least depth, as a batch; zeros elsewhere."""
        assert self.samples is not None
        rows, mask = self.rows[self.start], self.samples.mask
        first = next(iter(rows.values()))
        shape = first.shape if mask is None else (mask.shape[1], *first.shape[1:])
        hidden = torch.zeros((len(self.samples.ids), *shape), dtype=first.dtype, device=device)
        fill(hidden, rows, mask)
        return hidden


class PrefixLayers:
    """The layers of a model that a prefix can consist of, under control while it runs.

    Args:
        model: The model.
        layers: Its layers in order, with their names.

    Attributes:
        boundary: Number of layers in the prefix.
        current: The forward pass that is under way.
    """

    def __init__(self, model: nn.Module, layers: list[Named]) -> None:
        self.boundary = 0
        self.current: Forward | None = None
        self._model = model
        self._layers = layers
        self._outputs = [LayerOutput() for _ in layers]
        self._interceptions: list[Interception] = []

    def intercept(self, boundary: int) -> None:
        """Take the calls of the first `boundary` layers, and of no others."""
        for interception in self._interceptions:
            interception.remove()
        self._interceptions = [
            Interception(module, self._around(index))
            for index, (_, module) in enumerate(self._layers[:boundary])
        ]
        self.boundary = boundary

    def known(self, count: int) -> bool:
        """Whether the form of the output of the first `count` layers is known."""
        return all(output.known for output in self._outputs[:count])

    def run(
        self, forward: Forward, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The model's own forward pass, in evaluation mode up to the end of the prefix."""
        for interception in self._interceptions:
            interception.renew()
        self.current = forward
        # comes after all other hooks, which are to see the mode that the model is in
        hook = self._model.register_forward_pre_hook(
            lambda *_: forward.evaluation.begin(self._model.modules())
        )
        try:
            return call(*args, **kwargs)
        finally:
            hook.remove()
            forward.evaluation.end()
            self.current = None
            if not forward.calls and not forward.failed:
                forward.failed = (
                    f"layer '{self._layers[self.boundary - 1][0]}' was not called as a module "
                    "(if the model is compiled as a whole: compile its layers instead)"
                )

    def _around(self, index: int) -> Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]:
        def around(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            forward, source = self.current, entering(args, kwargs)
            if forward is None or forward.failed or source is None:
                return call(*args, **kwargs)
            forward.wants_gradient |= index == 0 and source.requires_grad
            # also where a wrapper of the model's forward turns it on
            forward.half |= torch.is_autocast_enabled(source.device.type)
            if index < forward.start:
                hidden = self._spared(index, forward, source)
                if hidden is not None:
                    return self._left(index, forward, hidden)
            return self._computed(index, forward, source, lambda: call(*args, **kwargs))

        return around

    def _spared(self, index: int, forward: Forward, source: Tensor) -> Tensor | None:
        """Hidden states without running the layer; None if their shape is not known."""
        if index == forward.start - 1:
            return forward.assembled(source.device)
        return self._outputs[index].blank(source)

    def _computed(self, index: int, forward: Forward, source: Tensor, call: Call) -> Any:
        """Run a layer without gradients, in evaluation mode also when it is called again."""
        name, module = self._layers[index]
        evaluation = Evaluation(module.modules())
        try:
            with torch.no_grad():
                result = call()
        finally:
            evaluation.end()
        hidden = self._outputs[index].learn(result, source)
        if isinstance(hidden, str):
            forward.failed = f"layer '{name}' {hidden}"
            forward.evaluation.end()
            return result
        rows = forward.rows.get(index + 1, {}) if index >= forward.start else {}
        if rows and forward.samples is not None:
            fill(hidden, rows, forward.samples.mask)
        return self._left(index, forward, hidden)

    def _left(self, index: int, forward: Forward, hidden: Tensor) -> Any:
        """The output of a layer; behind the last one the model runs as it is."""
        hidden = hidden.detach()
        forward.half |= hidden.element_size() <= 2
        if index == self.boundary - 1:
            forward.evaluation.end()
            forward.calls += 1
            self._note(forward, hidden)
            if forward.wants_gradient and torch.is_grad_enabled():
                hidden.requires_grad_()  # reentrant checkpointing further up asks for it
        return self._outputs[index].around(hidden)

    def _note(self, forward: Forward, hidden: Tensor) -> None:
        """Copy what is not stored at this boundary, before the model can change it in place."""
        samples = forward.samples
        if samples is None or (forward.start and set(forward.rows) == {self.boundary}):
            return
        if samples.mask is not None and hidden.shape[:2] != samples.mask.shape:
            forward.failed = (
                f"layer '{self._layers[self.boundary - 1][0]}' puts out shape "
                f"{list(hidden.shape)} for a mask of shape {list(samples.mask.shape)}, which does "
                "not tell its padding"
            )
            return
        forward.computed = split(hidden, samples.mask)


def automatic_precision(model: nn.Module) -> str:
    """The number format of automatic mixed precision as it is now set, or "none"."""
    device = next(model.parameters()).device.type
    automatic = torch.is_autocast_enabled(device)
    return str(torch.get_autocast_dtype(device)) if automatic else "none"
