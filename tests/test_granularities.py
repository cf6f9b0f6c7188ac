"""Components by pattern and by function; requests that cannot be met say what can."""

from __future__ import annotations

import pytest
from torch import nn

from families import FAMILIES
from rgft.components import partition
from rgft.errors import InputError


def summary(components):
    return [(c.name, c.kind, c.depth, c.numel) for c in components]


def test_pattern_without_groups_names_by_the_match():
    components = partition(FAMILIES["mlp"](), r"weight")
    assert summary(components) == [("weight", "custom", 1, 136), ("rest", "other", 1, 19)]


def test_groups_of_a_pattern_are_joined():
    components = partition(FAMILIES["mlp"](), r"^(\d).*(weight|nothing)?$")
    assert [c.name for c in components] == ["0", "2", "4"]
    components = partition(FAMILIES["bert"](), r"layer\.(\d)\.(attention|output|intermediate)")
    assert [c.name for c in components if c.depth == 2] == [
        "1.attention",
        "1.intermediate",
        "1.output",
    ]
    rest = next(c for c in components if c.name == "rest")
    assert (rest.kind, rest.depth) == ("other", 0)


def test_a_component_lies_where_its_lowest_parameter_is():
    components = partition(FAMILIES["bert"](), r"encoder\.layer\.[01]|classifier")
    assert [(c.name, c.depth) for c in components] == [
        ("rest", 0),
        ("encoder.layer.0", 1),
        ("encoder.layer.1", 2),
        ("classifier", 4),
    ]


def test_function():
    components = partition(
        FAMILIES["mlp"](), lambda name, p: "small" if p.numel() < 50 else name[0]
    )
    assert summary(components) == [
        ("small", "custom", 1, 8 + 8 + 24 + 3 + 48),
        ("2", "custom", 2, 64),
    ]


@pytest.mark.parametrize("wrong", [None, "", 3])
def test_function_that_names_nothing(wrong):
    with pytest.raises(InputError, match=r"returned .* for '0\.weight': it must return the name"):
        partition(FAMILIES["mlp"](), lambda name, p: wrong)


@pytest.mark.parametrize("typo", ["blok", "Layer ", "heads", "x*", "(", 3])
def test_typos_are_caught(typo):
    with pytest.raises(InputError, match="one of layer, block, head, lora, parameter") as caught:
        partition(FAMILIES["mlp"](), typo)
    assert "\n" not in str(caught.value)
    assert repr(typo) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "finest"), [("bert", "head"), ("resnet", "layer"), ("mlp", "layer")]
)
def test_lora_without_lora(family, finest):
    with pytest.raises(InputError, match=f"has none; the finest .* is '{finest}'"):
        partition(FAMILIES[family](), "lora")


def test_model_without_parameters():
    with pytest.raises(InputError, match="ReLU has no parameters"):
        partition(nn.ReLU(), "layer")
