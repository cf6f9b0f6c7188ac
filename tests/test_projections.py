"""Projections are recognised by name and shape, and cut along the right dimension."""

from __future__ import annotations

import pytest
from torch import nn

from families import FAMILIES, with_lora
from rgft.structure.projections import Portion, UnsplittableError, find_projections


class Separate(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(8, 8))


@pytest.mark.parametrize(
    "names",
    [
        ["q", "k", "v", "o"],
        ["query", "key", "value", "dense"],
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        ["q_lin", "k_lin", "v_lin", "out_lin"],
        ["wq", "wk", "wv", "wo"],
        ["to_q", "to_k", "to_v", "to_out"],
    ],
)
def test_separate_projections_under_many_names(names):
    for order in (names, names[::-1]):
        inputs, output = find_projections(Separate(order))
        assert [p.name for p in inputs] == names[:3]
        assert output.name == names[3]


@pytest.mark.parametrize(
    "names", [["q", "k", "o"], ["q", "k", "v", "o", "dense"], ["q", "k", "v"], ["qkv", "o"], []]
)
def test_what_is_not_certain_is_refused(names):
    # "qkv" makes as many features as the output takes, so it cannot be three of them
    with pytest.raises(UnsplittableError, match="are not q, k, v"):
        find_projections(Separate(names))


def test_packed_weights_are_refused():
    attention = Separate(["q", "k", "v", "o"])
    attention.q.weight = nn.Parameter(attention.q.weight.reshape(-1, 1))
    with pytest.raises(UnsplittableError, match="the weight of q is packed"):
        find_projections(attention)


def test_rows_and_columns_of_both_orientations():
    for name, transposed in (("gpt2", True), ("gpt_neox", False)):
        model = FAMILIES[name]()
        layers = model.transformer.h if name == "gpt2" else model.gpt_neox.layers
        (fused,), output = find_projections(layers[0].attn if transposed else layers[0].attention)
        rows, columns = fused.rows(4, 6), output.columns(4, 6)
        assert [p.dim for p in rows] == [int(transposed), 0]
        assert [p.dim for p in columns] == [1 - int(transposed)]
        assert [p.numel for p in rows] == [2 * 16, 2]
        assert [p.numel for p in columns] == [2 * 16]


def test_lora_factors_are_cut_with_the_weight():
    model = with_lora(FAMILIES["bert"](), rank=2)
    attention = model.get_base_model().bert.encoder.layer[0].attention
    (query, _, _), output = find_projections(attention)
    assert [tuple(p.parameter.shape) for p in query.rows(0, 4)] == [(16, 16), (16,), (16, 2)]
    assert [p.numel for p in output.columns(0, 4)] == [16 * 4, 2 * 4]


def test_a_whole_parameter_is_a_piece():
    assert Portion(nn.Linear(3, 4).weight).numel == 12
