"""Layers are found in structures of every kind."""

from __future__ import annotations

from torch import nn

from families import FAMILIES
from rgft.structure.layers import attentions, find_layers, is_norm, matrices, plain, unwrapped


def paths(root: nn.Module) -> list[str]:
    return [path for path, _ in find_layers(root, "")]


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


def test_experts_are_not_layers():
    class MixtureLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.experts = nn.ModuleList(FeedForward() for _ in range(3))

    model = nn.ModuleDict({"layers": nn.ModuleList(MixtureLayer() for _ in range(2))})
    assert paths(model) == ["layers.0", "layers.1"]


def test_blocks_among_other_modules_of_a_sequence():
    stage = nn.Sequential(FeedForward(), FeedForward())
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), stage, nn.BatchNorm2d(4), nn.Sequential(FeedForward())
    )
    assert paths(model) == ["1.0", "1.1", "3.0"]


def test_single_weights_that_repeat():
    assert paths(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))) == ["0", "2"]


def test_children_where_nothing_repeats():
    names = ["table", "lstm", "norm", "out"]
    parts = [nn.Embedding(5, 4), nn.LSTM(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)]
    model = nn.Module()
    for name, part in zip(names, parts, strict=True):
        model.add_module(name, part)
    assert paths(model) == ["lstm", "out"]
    wrapper = nn.Module()
    wrapper.inner = model
    assert paths(wrapper) == ["inner.lstm", "inner.out"]


def test_models_in_a_container_are_not_layers():
    encoders = nn.ModuleList(FAMILIES["bert"]() for _ in range(2))
    assert paths(encoders) == [f"{i}.bert.encoder.layer.{j}" for i in (0, 1) for j in (0, 1)]


def test_a_layer_used_twice_is_one_layer():
    shared = FeedForward()
    assert paths(nn.ModuleList([shared, FeedForward(), shared])) == ["0", "1"]


def test_outermost_attention_only():
    layer = nn.TransformerDecoderLayer(4, 2, 8)
    assert [path for path, _ in attentions(layer)] == ["self_attn", "multihead_attn"]
    assert not list(attentions(FeedForward()))


def test_norms():
    assert all(
        map(is_norm, [nn.LayerNorm(3), nn.BatchNorm2d(3), nn.RMSNorm(3), nn.GroupNorm(1, 3)])
    )
    assert not any(map(is_norm, [nn.Linear(3, 3), nn.LayerNorm(3, elementwise_affine=False)]))


def test_wrappers_are_looked_through():
    model = FeedForward()
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(model) is model
    assert plain(model) is model
    assert matrices(model) == 2
