"""A model without dropout."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

NAME = "drop"  # in every library's names of such probabilities: attention_dropout, drop_prob, ...


def turn_off_dropout(model: nn.Module) -> int:
    """Set the probability of every dropout in `model` to 0, in place.

    Dropout (Srivastava et al. 2014) keeps a model from learning its training data by heart over
    many epochs. A run that sees each sample a time or two pays for it, in slower learning, and gets
    nothing in return. The model's config keeps its values: what `save_pretrained` writes has
    dropout again when it is trained the next time.

    Args:
        model: Any. Probabilities are those of dropout modules, and numbers between 0 and 1 that
            other modules hold under a name with "drop" in it (stochastic depth among them).

    Returns:
        How many probabilities there are that were not 0 already.

    >>> turn_off_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Dropout(0.0)))
    1
    """
    found = 0
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            found += module.p > 0
            module.p = 0.0
            continue
        for name, value in vars(module).items():
            if NAME in name and isinstance(value, float) and 0 < value < 1:
                setattr(module, name, 0.0)
                found += 1
    return found
