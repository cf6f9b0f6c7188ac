"""A bypass is exactly the gradient with the branch held constant, found in every architecture."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from families import BATCHES, FAMILIES, with_lora
from flops import counted_flops, result
from rgft import Bypass, CostModel, InputError, ResidualBranches, partition, residual_branches
from rgft.components import Component

Gradients = dict[str, Tensor | None]

# the first component of each granularity and kind, and where its branches end
ENDS: dict[str, dict[str, tuple[str, ...]]] = {
    "bert": {
        "bert.encoder.layer.0.attention": ("bert.encoder.layer.0.attention.output.dropout",),
        "bert.encoder.layer.0.feed_forward": ("bert.encoder.layer.0.output.dropout",),
        "bert.encoder.layer.0": (
            "bert.encoder.layer.0.attention.output.dropout",
            "bert.encoder.layer.0.output.dropout",
        ),
    },
    "roberta": {
        "roberta.encoder.layer.1.attention": ("roberta.encoder.layer.1.attention.output.dropout",),
    },
    "distilbert": {
        "distilbert.transformer.layer.0.attention": ("distilbert.transformer.layer.0.attention",),
        "distilbert.transformer.layer.0.feed_forward": ("distilbert.transformer.layer.0.ffn",),
    },
    "albert": {  # one layer that runs three times: bypassed in all of them
        "albert.encoder.albert_layer_groups.0.albert_layers.0": (
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.output_dropout",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
        ),
    },
    "deberta_v2": {
        "deberta.encoder.layer.0.attention": ("deberta.encoder.layer.0.attention.output.dropout",),
    },
    "electra": {
        "electra.encoder.layer.0.feed_forward": ("electra.encoder.layer.0.output.dropout",)
    },
    "gpt2": {
        "transformer.h.0.attention": ("transformer.h.0.attn",),
        "transformer.h.0.feed_forward": ("transformer.h.0.mlp",),
    },
    "gpt_neox": {
        "gpt_neox.layers.0": (
            "gpt_neox.layers.0.post_attention_dropout",
            "gpt_neox.layers.0.post_mlp_dropout",
        ),
    },
    "llama": {"model.layers.1": ("model.layers.1.self_attn", "model.layers.1.mlp")},
    "qwen3": {"model.layers.1": ("model.layers.1.self_attn", "model.layers.1.mlp")},
    "gemma": {"model.layers.0.feed_forward": ("model.layers.0.mlp",)},
    "gemma2": {
        "model.layers.0.attention": ("model.layers.0.post_attention_layernorm",),
        "model.layers.0.feed_forward": ("model.layers.0.post_feedforward_layernorm",),
    },
    "gemma3": {"model.layers.0.attention": ("model.layers.0.post_attention_layernorm",)},
    "phi3": {"model.layers.0.attention": ("model.layers.0.resid_attn_dropout",)},
    "t5": {
        "encoder.block.0.attention": ("encoder.block.0.layer.0.dropout",),
        "decoder.block.1.cross_attention": ("decoder.block.1.layer.1.dropout",),
        "decoder.block.1": tuple(f"decoder.block.1.layer.{i}.dropout" for i in range(3)),
    },
    "bart": {
        "model.encoder.layers.0.attention": ("model.encoder.layers.0.self_attn",),
        "model.encoder.layers.0.feed_forward": ("model.encoder.layers.0.fc2",),
        "model.decoder.layers.0.cross_attention": ("model.decoder.layers.0.encoder_attn",),
    },
    "vit": {"vit.layers.0": ("vit.layers.0.attention", "vit.layers.0.mlp")},
    "swin": {
        "swin.encoder.layers.1.blocks.1.attention": ("swin.encoder.layers.1.blocks.1.drop_path",),
        "swin.encoder.layers.1.blocks.1.feed_forward": ("swin.encoder.layers.1.blocks.1.mlp",),
    },
    "convnext": {
        "convnext.encoder.stages.2.layers.1": ("convnext.encoder.stages.2.layers.1.drop_path",),
    },
    "efficientnet": {"_blocks.2": ("_blocks.2._bn2",)},
    "resnet": {"layer1.0": ("layer1.0.bn2",)},
    "torch_encoder": {"layers.0": ("layers.0.dropout1", "layers.0.dropout2")},
}
# no skip connection goes straight past these: it has weights, or there is none
NO_SKIP = {
    "resnet": {"layer2.0", "layer3.0", "layer4.0"},
    "efficientnet": {f"_blocks.{i}" for i in (0, 1, 3, 5, 8, 11, 15)},
}
CONVOLUTIONS = ("convnext", "efficientnet", "resnet")


def family(name: str) -> nn.Module:
    return FAMILIES[name]().double().train()


def batch_of(name: str) -> dict[str, Tensor]:
    batch = BATCHES[name]()
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def granularities(name: str) -> list[str]:
    return ["layer"] if name in CONVOLUTIONS else ["layer", "block"]


def found_in(
    name: str, model: nn.Module, granularity: str
) -> tuple[list[Component], ResidualBranches]:
    components = partition(model, granularity)
    return components, residual_branches(model, components, lambda m: m(**batch_of(name)))


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> Gradients:
    """Under one and the same dropout."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    result(model(**batch)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def held_constant(model: nn.Module, modules: Iterable[str]) -> nn.Module:
    """A copy in which modules compute as ever, but return constants: no gradient was ever there."""
    model = copy.deepcopy(model)
    for path in modules:
        module = model.get_submodule(path)
        module.forward = without_grad(module.forward)  # type: ignore[method-assign]
    return model


def without_grad(forward: Callable[..., Any]) -> Callable[..., Any]:
    def constant(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        full = forward(*args, **kwargs)
        torch.set_rng_state(state)
        with torch.no_grad():
            output = forward(*args, **kwargs)
        # what else a module returns (attention biases) keeps its gradient
        return output if isinstance(output, Tensor) else (output[0], *full[1:])

    return constant


def assert_same(actual: Gradients, expected: Gradients, names: Iterable[str] | None = None) -> None:
    for name in actual if names is None else names:
        left, right = actual[name], expected[name]
        assert (left is None) == (right is None), name
        if left is not None and right is not None:
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("name", ENDS)
def test_branches_end_where_they_are_added(name: str) -> None:
    model = family(name)
    found: dict[str, tuple[str, ...]] = {}
    for granularity in granularities(name):
        components, branches = found_in(name, model, granularity)
        kinds = {"layer"} if granularity == "layer" else {"attention", "feed_forward"}
        expected = {c.name for c in components if c.kind in kinds}
        assert set(branches.modules) == expected - NO_SKIP.get(name, set())
        assert set(branches.missing) == {c.name for c in components} - set(branches.modules)
        found |= branches.modules
    assert ENDS[name].items() <= found.items()


@pytest.mark.parametrize("name", ENDS)
def test_layer_has_the_branches_of_its_blocks(name: str) -> None:
    if name in CONVOLUTIONS:
        return
    model = family(name)
    layers, blocks = (found_in(name, model, g)[1].modules for g in ("layer", "block"))
    for layer, modules in layers.items():
        inside = {
            m for block, held in blocks.items() if block.startswith(layer + ".") for m in held
        }
        assert set(modules) == inside


@pytest.mark.parametrize("name", ENDS)
def test_gradients_are_those_with_the_branch_held_constant(name: str) -> None:
    model, batch = family(name), batch_of(name)
    exact = gradients(model, batch)
    for granularity in granularities(name):
        components, branches = found_in(name, model, granularity)
        bypass = Bypass(model, branches)
        depth = {c.name: c.depth for c in components}
        for chosen in [*([c] for c in branches.modules), list(branches.modules)]:
            bypass.set(chosen)
            actual = gradients(model, batch)
            assert_same(actual, gradients(held_constant(model, branches.of(chosen)), batch))
            lost = {n for n, g in actual.items() if g is None and exact[n] is not None}
            assert lost == branches.without_gradient(chosen)
            above = {
                piece.parameter
                for c in components
                for piece in c.slices
                if c.depth > max(depth[i] for i in chosen)
            }
            assert_same(actual, exact, above - lost)
            below = [p.parameter for c in components if c.depth == 0 for p in c.slices]
            assert any(actual[n] is not None and actual[n].any() for n in below) or not below
        bypass.close()
        assert_same(gradients(model, batch), exact)


@pytest.mark.parametrize("name", ENDS)
def test_backward_costs_less(name: str) -> None:
    model, batch = family(name), batch_of(name)
    components, branches = found_in(name, model, "layer")
    parameters = dict(model.named_parameters())
    chosen = list(branches.modules)[-1]
    _, full = counted_flops(model, batch)
    for piece in next(c for c in components if c.name == chosen).slices:
        parameters[piece.parameter].requires_grad_(False)
    forward, frozen = counted_flops(model, batch)
    Bypass(model, branches).set([chosen])
    forward_bypassed, bypassed = counted_flops(model, batch)
    assert forward_bypassed == forward
    assert bypassed < frozen < full


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "t5", "resnet"])
def test_costs_what_the_cost_model_says(name: str) -> None:
    model, batch = family(name), batch_of(name)
    graph = CostModel(model).graph(**batch)
    parameters = dict(model.named_parameters())
    for granularity in granularities(name):
        components, branches = found_in(name, model, granularity)
        bypass = Bypass(model, branches)
        for chosen in [*([c] for c in branches.modules), list(branches.modules)]:
            bypass.set(chosen)
            held = {s.parameter for c in components if c.name in chosen for s in c.slices}
            trained = parameters.keys() - held
            for names in (trained, parameters.keys()):  # a bypassed branch costs nothing either way
                for parameter, weight in parameters.items():
                    weight.requires_grad_(parameter in names)
                model.zero_grad(set_to_none=True)
                cost = graph.cost(names, detached=branches.of(chosen))
                assert (cost.forward, cost.backward) == counted_flops(model, batch)
            assert cost.backward < graph.cost(parameters).backward
        bypass.close()


# -- against blocks with `.detach()` in the code -------------------------------------------------


class PreNorm(nn.Module):
    """x + f(norm(x)), then x + g(norm(x)); f and g constant where `constant` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
        self.constant: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        branch = self.attn(y, y, y)[0]
        x = x + (branch.detach() if "attention" in self.constant else branch)
        branch = self.mlp(self.norm2(x))
        return x + (branch.detach() if "feed_forward" in self.constant else branch)


class PostNorm(PreNorm):
    """norm(x + f(x)), then norm(x + g(x))."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attn(x, x, x)[0]
        x = self.norm1(x + (branch.detach() if "attention" in self.constant else branch))
        branch = self.mlp(x)
        return self.norm2((branch.detach() if "feed_forward" in self.constant else branch) + x)


class Stack(nn.Module):
    def __init__(self, block: type[PreNorm], count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList(block() for _ in range(count))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square()


def stack(block: type[PreNorm]) -> nn.Module:
    torch.manual_seed(0)
    return Stack(block).double()


def stack_batch() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)).double()}


def branches_of(
    model: nn.Module, batch: dict[str, Tensor], granularity: str = "block"
) -> ResidualBranches:
    return residual_branches(model, partition(model, granularity), lambda m: m(**batch))


@pytest.mark.parametrize("block", [PreNorm, PostNorm])
@pytest.mark.parametrize(
    "parts", [("attention",), ("feed_forward",), ("attention", "feed_forward")]
)
def test_equals_detach_in_the_code(block: type[PreNorm], parts: tuple[str, ...]) -> None:
    batch = stack_batch()
    written = stack(block)
    written.layers[1].constant = parts  # type: ignore[index, union-attr]
    expected = gradients(written, batch)
    model = stack(block)
    Bypass(model, branches_of(model, batch)).set(f"layers.1.{part}" for part in parts)
    actual = gradients(model, batch)
    assert all((actual[n] is None) == (expected[n] is None) for n in expected)
    assert all(torch.equal(g, expected[n]) for n, g in actual.items() if g is not None)
    assert actual["layers.1.mlp.0.weight"] is None or "feed_forward" not in parts


@pytest.mark.parametrize("block", [PreNorm, PostNorm])
def test_a_bypassed_layer_saves_its_whole_backward(block: type[PreNorm]) -> None:
    batch = stack_batch()

    def backward(count: int, bypassed: tuple[str, ...]) -> int:
        model = Stack(block, count).double()
        Bypass(model, branches_of(model, batch, "layer")).set(bypassed)
        return counted_flops(model, batch)[1]

    assert backward(3, ("layers.1",)) == backward(3, ("layers.2",)) == backward(2, ())
    assert backward(4, ("layers.0", "layers.2")) == backward(2, ())


class SharedDropout(nn.Module):
    """One dropout for the branches of both blocks, as in much code written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.attn = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Parallel(SharedDropout):
    """(x + f(norm(x))) + g(norm(x)), summed in an order that makes no branch the last."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return (x + 0.5 * self.attn(y)) + self.mlp(self.norm2(x)) * 2


@pytest.mark.parametrize("block", [SharedDropout, Parallel])
def test_modules_of_several_branches_are_passed_over(block: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), block(), block(), nn.Linear(6, 2)).double()
    batch = {"input": stack_batch()["x"]}
    branches = branches_of(model, batch, r"(\d)\.(attn|mlp)")
    assert branches.modules == {f"{i}.{p}": (f"{i}.{p}",) for i in (1, 2) for p in ("attn", "mlp")}
    Bypass(model, branches).set(["1.attn"])
    actual = gradients(model, batch)
    assert_same(actual, gradients(held_constant(model, ["1.attn"]), batch))
    assert actual["1.mlp.0.weight"] is not None and actual["1.attn.0.weight"] is None


# -- lifecycle -----------------------------------------------------------------------------------


def bert() -> tuple[nn.Module, dict[str, Tensor], Bypass]:
    model, batch = tiny.bert(dtype=torch.float64), tiny.tokens()[0]
    return model, batch, Bypass(model, branches_of(model, batch, "layer"))


LAYERS = [f"bert.encoder.layer.{i}" for i in range(3)]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def test_set_replaces_and_close_restores() -> None:
    model, batch, bypass = bert()
    exact, keys = gradients(model, batch), list(model.state_dict())
    bypass.set([LAYERS[0]])
    bypass.set(iter([LAYERS[1], LAYERS[1]]))
    assert bypass.components == (LAYERS[1],) and hooks(model) == 2
    assert list(model.state_dict()) == keys
    bypass.set([])
    assert bypass.components == () and hooks(model) == 0
    bypass.set(LAYERS)
    bypass.close()
    assert hooks(model) == 0
    assert_same(gradients(model, batch), exact)


def test_finding_leaves_the_model_alone() -> None:
    model, batch = family("resnet"), batch_of("resnet")
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    random = torch.get_rng_state()
    branches_of(model, batch, "layer")
    assert torch.equal(torch.get_rng_state(), random) and not calls and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["fc.weight"]


def test_nothing_happens_in_evaluation() -> None:
    model, batch, bypass = bert()
    exact = gradients(model, batch)
    bypass.set(LAYERS)
    model.eval()
    assert_same(gradients(model, batch), exact)
    model.train()
    with torch.no_grad():
        assert not model(**batch).logits.requires_grad
    assert gradients(model, batch)["bert.encoder.layer.0.output.dense.weight"] is None


def test_frozen_statistics_do_not_switch_it_off() -> None:
    model, batch = family("resnet"), batch_of("resnet")
    bypass = Bypass(model, branches_of(model, batch, "layer"))
    bypass.set(["layer1.0"])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert gradients(model, batch)["layer1.0.conv1.weight"] is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_bypassed_on_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, batch, bypass = bert()
    bypass.set([LAYERS[1]])
    expected = gradients(model, batch)
    twin = copied(model)
    bypass.close()
    assert_same(gradients(twin, batch), expected)
    model.eval()  # the mode of the copy counts
    assert gradients(twin, batch)["bert.encoder.layer.1.output.dense.weight"] is None
    twin.load_state_dict(model.state_dict())


# dynamo looks at the gradients of what goes into a compiled layer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("way", ["wrapper", "in place", "layers"])
def test_compiled_code_follows(way: str) -> None:
    """By default it ignores hooks that come later, and layers share what was compiled for one."""
    torch._dynamo.reset()
    model, batch, bypass = bert()
    layers = list(model.bert.encoder.layer)  # type: ignore[union-attr, arg-type]
    run = torch.compile(model, backend="eager") if way == "wrapper" else model
    for module in {"wrapper": [], "in place": [model], "layers": layers}[way]:
        module.compile(backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        for chosen in ([], [1], [], [0, 2], [1]):
            bypass.set(LAYERS[i] for i in chosen)
            model.zero_grad(set_to_none=True)
            run(**batch).loss.backward()
            weights = [layer.output.dense.weight for layer in layers]
            assert [i for i, weight in enumerate(weights) if weight.grad is None] == chosen
    torch._dynamo.reset()


def test_under_gradient_checkpointing() -> None:
    model, batch, bypass = bert()
    bypass.set([LAYERS[1]])
    expected = gradients(model, batch)
    tiny.checkpoint_activations(model)
    assert_same(gradients(model, batch), expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_looks_through_wrappers() -> None:
    model, batch = with_lora(FAMILIES["bert"]()).double().train(), batch_of("bert")
    branches = branches_of(model, batch, "layer")
    names = branches.without_gradient([LAYERS[0]])
    assert names <= dict(model.named_parameters()).keys()
    exact = gradients(model, batch)
    Bypass(model, branches).set([LAYERS[0]])
    actual = gradients(model, batch)
    lost = {n for n, g in actual.items() if g is None and exact[n] is not None}
    assert lost == {n for n in names if "lora_" in n} and lost


def test_cross_attention_may_be_all_that_leads_to_the_encoder() -> None:
    model = family("bart")
    _, branches = found_in("bart", model, "block")
    crosses = [name for name in branches.modules if "cross" in name]
    encoder = "model.encoder.layers.0.fc1.weight"
    assert encoder not in branches.without_gradient(crosses[:1])
    assert encoder in branches.without_gradient(crosses)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "granularity", "component", "reason"),
    [
        (
            "resnet",
            "layer",
            "layer2.0",
            "returns a residual branch with 'layer2.0.conv1.weight' in it",
        ),
        ("mlp", "layer", "2", "no module returns a residual branch with '2.weight' in it"),
        ("bert", "layer", "embeddings", "no module returns a residual branch with"),
        ("gpt2", "block", "transformer.h.0.norm", "also holds 'transformer.h.0.attention'"),
        ("bert", "head", "bert.encoder.layer.0.attention.head.0", "parts of matrices"),
        ("bert", "layer", "bert.encoder.layer.7", "the model has none of that name"),
    ],
)
def test_what_cannot_be_bypassed_is_named(
    name: str, granularity: str, component: str, reason: str
) -> None:
    model = family(name)
    _, branches = found_in(name, model, granularity)
    bypass = Bypass(model, branches)
    possible = list(branches.modules)[:1]
    bypass.set(possible)
    with pytest.raises(InputError) as caught:
        bypass.set([component])
    message = str(caught.value)
    assert message.startswith(f"component {component!r} cannot be bypassed: ")
    assert reason in message and "\n" not in message
    assert bypass.components == tuple(possible)


def test_what_the_example_does_not_use_is_named() -> None:
    model = stack(PreNorm)
    model.spare = nn.Linear(3, 3)  # type: ignore[assignment]
    branches = branches_of(model, stack_batch(), "parameter")
    assert branches.missing["spare.weight"] == "the loss of the example does not depend on it"


class Aside(nn.Linear):
    """Leaves its result in an attribute, where no hook gets to it."""

    def forward(self, x: Tensor) -> Tensor:
        self.result = super().forward(x)
        return self.result


class Whispering(PreNorm):
    """Adds what its attention left aside, not what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Aside(6, 6)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        self.attn(self.norm1(x))
        x = x + self.attn.result
        return x + self.mlp(self.norm2(x))


def test_what_detaching_does_not_stop_is_not_trusted() -> None:
    model = Stack(Whispering).double()
    branches = branches_of(model, stack_batch(), r"\d\.(?:attn|mlp)")
    assert branches.modules == {f"{i}.mlp": (f"layers.{i}.mlp",) for i in range(3)}
    assert branches.missing.keys() >= {f"{i}.attn" for i in range(3)}
