"""A plan: what happens to each component until the next decision."""

from __future__ import annotations

from dataclasses import dataclass

from rgft.components import Component


@dataclass(frozen=True, slots=True)
class Plan:
    """Learning-rate multipliers of all components, in the order of the partition.

    Attributes:
        components: The partition it is about.
        lr_scale: Multiplier on the scheduled learning rate; 0 freezes the component.
    """

    components: tuple[Component, ...]
    lr_scale: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.components) == len(self.lr_scale)

    @property
    def trained(self) -> tuple[bool, ...]:
        """Whether each component is updated."""
        return tuple(scale > 0 for scale in self.lr_scale)

    @property
    def boundary(self) -> int:
        """Depth of the deepest (closest to the input) trained component: backward stops there."""
        return min(
            (c.depth for c, on in zip(self.components, self.trained, strict=True) if on), default=0
        )

    def __getitem__(self, name: str) -> float:
        """The multiplier of the component called `name`."""
        for component, scale in zip(self.components, self.lr_scale, strict=True):
            if component.name == name:
                return scale
        raise KeyError(name)

    def __str__(self) -> str:
        """One line a component."""
        return "\n".join(_line(c, s) for c, s in zip(self.components, self.lr_scale, strict=True))


def _line(component: Component, scale: float) -> str:
    return f"{component.name}: {'frozen' if scale == 0 else f'x{scale:.3g}'}"
