"""Without dropout a model in training computes what it computes in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from families import BATCHES, FAMILIES
from rgft import turn_off_dropout


def outputs(model: nn.Module, name: str) -> Tensor:
    torch.manual_seed(0)
    found = model(**BATCHES[name]())
    return getattr(found, "logits", found)


def has_running_statistics(name: str) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in FAMILIES[name]().modules())


@pytest.mark.parametrize("name", [n for n in FAMILIES if not has_running_statistics(n)])
def test_training_equals_evaluation(name: str) -> None:
    model = FAMILIES[name]()
    expected = outputs(model.eval(), name)
    acted = not torch.equal(outputs(model.train(), name), expected)
    found = turn_off_dropout(model)
    torch.testing.assert_close(outputs(model.train(), name), expected)
    assert found > 0 or not acted
    assert turn_off_dropout(model) == 0


def test_dropout_acts_in_most_families() -> None:
    assert sum(turn_off_dropout(build()) > 0 for build in FAMILIES.values()) >= len(FAMILIES) / 2
