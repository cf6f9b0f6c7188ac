"""Training with the prefix cache is training without it, and the layers do not run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import tiny
from families import BATCHES, FAMILIES, ResNet
from flops import counted_flops, result
from rgft import FlopMeter
from rgft.components import partition
from rgft.errors import InputError
from rgft.execution.prefix_batch import content_hashes
from rgft.execution.prefix_cache import PrefixCache
from rgft.execution.stored_samples import Storage
from test_activations import files_up_to

ROWS, BATCH = 22, 4
Batch = dict[str, Any]
Data = list[dict[str, Tensor]]


def text_model(name: str) -> nn.Module:
    """Four layers with dropout."""
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 40}
    shape |= {"intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "bert": ("BertForSequenceClassification", shape),
        "roberta": ("RobertaForSequenceClassification", shape),
        "deberta": (
            "DebertaV2ForSequenceClassification",
            {**shape, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ),
        "llama": ("LlamaForSequenceClassification", {**shape, "attention_dropout": 0.1}),
        "gpt2": (
            "GPT2ForSequenceClassification",
            {"n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32, "vocab_size": 40}
            | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        ),
        "bart": (
            "BartForSequenceClassification",
            {"d_model": 16, "vocab_size": 40, "max_position_embeddings": 32, "num_labels": 2}
            | {f"{side}_layers": 4 for side in ("encoder", "decoder")}
            | {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
            | {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
            | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        ),
    }
    kind, config = configs[name]
    cls = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(cls.config_class(**config)).train()


class Stack(nn.Sequential):
    """An MLP with all that behaves differently in training, some of it in place."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            nn.Linear(8, 12),
            nn.ReLU(inplace=True),
            nn.Linear(12, 12),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            nn.Linear(12, 2),
        )


def plain_model(name: str) -> nn.Module:
    builders: dict[str, Callable[[], nn.Module]] = {
        "vit": FAMILIES["vit"],
        "swin": FAMILIES["swin"],
        "convnext": FAMILIES["convnext"],
        "resnet": ResNet,
        "sequential": Stack,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = builders[name]()
    if name == "vit":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
    return model.train()


def texts(seed: int = 0, ends: int | None = None) -> Data:
    random = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(ROWS):
        length = int(torch.randint(2, 10, (), generator=random))
        ids = torch.randint(3, 40, (length,), generator=random)
        if ends is not None:
            ids[-1] = ends
        rows.append({"input_ids": ids, "labels": torch.tensor(i % 2)})
    return rows


def images(*shape: int, name: str = "pixel_values") -> Data:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, *shape, generator=random)
    return [{name: values[i], "labels": torch.tensor(i % 2)} for i in range(ROWS)]


def collated(data: Data, ids: list[int], width: int, left: bool) -> Batch:
    rows = [data[i] for i in ids]
    batch: Batch = {"labels": torch.stack([row["labels"] for row in rows])}
    if "input_ids" not in rows[0]:
        name = next(iter(rows[0]))
        return {name: torch.stack([row[name] for row in rows]), **batch}
    tokens = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        place = slice(width - length, width) if left else slice(length)
        tokens[i, place], mask[i, place] = row["input_ids"], 1
    return {"input_ids": tokens, "attention_mask": mask, **batch}


def epochs(data: Data, count: int, left: bool = False) -> Iterator[tuple[int, list[int], Batch]]:
    """Shuffled batches, in every other epoch of like lengths, padded by a random amount."""
    random = np.random.default_rng(0)
    for epoch in range(count):
        order = random.permutation(len(data))
        if epoch % 2 and "input_ids" in data[0]:
            order = np.array(sorted(order, key=lambda i: len(data[i]["input_ids"])))
        for start in range(0, len(order), BATCH):
            ids = order[start : start + BATCH].tolist()
            longest = max(len(data[i].get("input_ids", ())) for i in ids)
            yield epoch, ids, collated(data, ids, longest + int(random.integers(0, 5)), left)


def freeze(model: nn.Module, boundary: int) -> None:
    """Freeze the embeddings and the first layers; nothing else."""
    parameters = dict(model.named_parameters())
    for component in partition(model, "layer"):
        below = component.depth <= boundary and component.kind in ("embedding", "layer")
        for part in component.slices:
            parameters[part.parameter].requires_grad_(not (below or component.depth < boundary))


def loss_of(model: nn.Module, batch: Batch, **more: Any) -> Tensor:
    if hasattr(model, "config"):
        loss: Tensor = model(**batch, **more).loss
        return loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return nn.functional.cross_entropy(model(**inputs, **more), batch["labels"])


def trained(
    model: nn.Module,
    batches: Iterator[tuple[int, list[int], Batch]],
    boundary: Callable[[int], int],
    cache: PrefixCache | None,
    below: Callable[[int], list[nn.Module]],
) -> dict[str, Tensor]:
    """The weights after training; without a cache the prefix is in evaluation mode by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(1)
    for epoch, ids, batch in batches:
        freeze(model, boundary(epoch))
        model.train()
        if cache is not None:
            cache.set_boundary(boundary(epoch))
            loss = loss_of(model, batch, sample_ids=ids)
        else:
            for module in below(boundary(epoch)):
                module.eval()
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


# Where the layers are, and what comes before them and behaves differently in training
PLACES: dict[str, tuple[str, list[str]]] = {
    "bert": ("bert.encoder.layer", ["bert.embeddings"]),
    "roberta": ("roberta.encoder.layer", ["roberta.embeddings"]),
    "deberta": ("deberta.encoder.layer", ["deberta.embeddings"]),
    "llama": ("model.layers", []),
    "gpt2": ("transformer.h", ["transformer.drop"]),
    "vit": ("vit.layers", ["vit.embeddings"]),
}


def below_of(model: nn.Module, name: str) -> Callable[[int], list[nn.Module]]:
    """What is to be in evaluation mode, by boundary."""
    if name == "sequential":
        counts = {0: 0, 1: 1, 2: 5, 3: 7}
        return lambda boundary: list(model.children())[: counts[boundary]]
    if name == "resnet":
        stages = [model.layer1, model.layer2, model.layer3, model.layer4]
        layers = [block for stage in stages for block in stage]
        return lambda boundary: [model.conv1, model.bn1, *layers[:boundary]] if boundary else []
    path, before = PLACES[name]
    start = [model.get_submodule(module) for module in before]
    return lambda b: [*start, *list(model.get_submodule(path))[:b]] if b else []


DATA: dict[str, tuple[Callable[[], nn.Module], Data, bool]] = {
    "bert": (lambda: text_model("bert"), texts(), False),
    "roberta": (lambda: text_model("roberta"), texts(), False),
    "deberta": (lambda: text_model("deberta"), texts(), False),
    "gpt2": (lambda: text_model("gpt2"), texts(), False),
    "llama": (lambda: text_model("llama"), texts(), False),
    "llama, padded on the left": (lambda: text_model("llama"), texts(), True),
    "vit": (lambda: plain_model("vit"), images(3, 8, 8), False),
    "resnet": (lambda: plain_model("resnet"), images(3, 16, 16), False),
    "sequential": (lambda: plain_model("sequential"), images(6, name="input"), False),
}


@pytest.mark.parametrize("boundary", [1, 2])
@pytest.mark.parametrize("case", DATA)
def test_training_is_the_same_with_the_cache(case: str, boundary: int) -> None:
    build, data, left = DATA[case]
    name = case.partition(",")[0]
    plain, model = build(), build()
    wanted = trained(plain, epochs(data, 4, left), lambda _: boundary, None, below_of(plain, name))
    with PrefixCache(model) as cache:
        found = trained(model, epochs(data, 4, left), lambda _: boundary, cache, lambda _: [])
        use = cache.use
    assert_close(found, wanted, 1e-5)
    start = build().state_dict()
    assert max((found[name] - start[name]).abs().max() for name in found) > 1e-2
    assert (use.misses, use.hits, use.samples) == (ROWS, 3 * ROWS, ROWS)
    assert 2 <= use.checks <= 4


@pytest.mark.parametrize("case", ["bert", "llama, padded on the left", "resnet", "sequential"])
def test_training_is_the_same_while_the_boundary_moves(case: str) -> None:
    build, data, left = DATA[case]
    name = case.partition(",")[0]
    path = [1, 1, 3, 2, 2, 0, 1, 3]
    plain, model = build(), build()
    wanted = trained(
        plain, epochs(data, len(path), left), path.__getitem__, None, below_of(plain, name)
    )
    with PrefixCache(model, Storage(memory_bytes=1000)) as cache:
        found = trained(model, epochs(data, len(path), left), path.__getitem__, cache, lambda _: [])
        use = cache.use
    assert_close(found, wanted, 1e-5)
    # epochs with nothing to use: the first, and those after a move down; both moves up extend
    assert use.misses == 3 * ROWS and use.extended == 2 * ROWS and use.hits == 2 * ROWS


@pytest.mark.filterwarnings("ignore:a training batch has no:RuntimeWarning")
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"t5"}))
def test_every_family_is_served_at_every_boundary(name: str) -> None:
    model, batch = FAMILIES[name]().requires_grad_(False).train(), BATCHES[name]()
    ids = list(range(len(next(iter(batch.values())))))
    with PrefixCache(model) as cache:
        for boundary in range(1, len(cache.layers) + 1):
            cache.set_boundary(boundary)
            first = result(model(**batch, sample_ids=ids))
            torch.manual_seed(0)
            full = result(model(**batch))
            torch.manual_seed(0)
            seen: list[tuple[str, ...]] = []
            with model.register_forward_pre_hook(lambda *_, s=seen: s.append(cache.skipped)):
                spared = result(model(**batch, sample_ids=ids))
            assert seen == [cache.layers[:boundary]]
            torch.testing.assert_close(spared, full, rtol=1e-5, atol=1e-5)
            assert first.shape == full.shape
        assert cache.use.misses == len(ids)
        assert cache.skipped == ()


@pytest.mark.filterwarnings("ignore:a training batch has no:RuntimeWarning")
@pytest.mark.parametrize("boundary", [1, 3])
def test_spared_layers_cost_no_flops(boundary: int) -> None:
    """Three layers of which some are spared cost what a model without them does."""
    model, (batch,) = tiny.bert(3), tiny.tokens()
    left = tiny.bert(3 - boundary) if boundary < 3 else None
    for each in (model, left):
        if each is not None:
            each.bert.embeddings.requires_grad_(False)
    for layer in model.bert.encoder.layer[:boundary]:
        layer.requires_grad_(False)
    ids = {"sample_ids": [0, 1, 2, 3]}
    with PrefixCache(model) as cache:
        cache.set_boundary(boundary)
        full = counted_flops(model, batch)
        model(**batch, **ids)
        spared = counted_flops(model, {**batch, **ids})
    assert spared[0] < full[0] and spared[1] == full[1]
    one = (counted_flops(tiny.bert(2), batch)[0] - counted_flops(tiny.bert(1), batch)[0]) * boundary
    assert full[0] - spared[0] == one
    if left is not None:
        assert spared[0] == counted_flops(left, batch)[0]


def test_moving_up_runs_the_new_layers_alone() -> None:
    model, (batch,) = tiny.bert(3).requires_grad_(False), tiny.tokens()
    ids = {"sample_ids": [0, 1, 2, 3]}
    with PrefixCache(model) as cache:
        cache.set_boundary(1)
        model(**batch, **ids)
        cache.set_boundary(3)
        counts: list[int] = []
        for layer in model.bert.encoder.layer:
            layer.register_forward_hook(lambda *_: counts.append(1))
        wanted = counted_flops(tiny.bert(2), batch)[0]
        with torch.no_grad():
            assert counted_flops(model, {**batch, **ids})[0] > wanted  # it is checked as well
            cache.set_boundary(1)
            model(**batch, **ids)
            cache.set_boundary(2)
            model(**batch, **ids)
        assert cache.use.extended == 8 and cache.use.misses == 8


def test_batches_of_samples_from_several_boundaries() -> None:
    model = text_model("bert").requires_grad_(False).eval()
    data = texts()
    with PrefixCache(model) as cache:
        for boundary, ids in ((1, [0, 1, 2]), (2, [1, 3]), (3, [3, 4]), (4, [0, 1, 2, 3, 4])):
            cache.set_boundary(boundary)
            batch = collated(data, ids, 12, False)
            if boundary == 2:
                model(**collated(data, [3], 10, False), sample_ids=[3])
            if boundary == 3:
                model(**collated(data, [4], 10, False), sample_ids=[4])
            found = model(**batch, sample_ids=ids).logits
        cache.paused = True
        torch.testing.assert_close(found, model(**batch, sample_ids=ids).logits)
        # of the last batch 0 and 2 were at boundary 1, sample 1 at 2, samples 3 and 4 at 3
        assert cache.use.extended == 1 + 1 + 5 and cache.use.samples == 5


@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 1e-2), ("int8", 2e-2)])
def test_short_formats_stay_close(kind: str, bound: float) -> None:
    model, data = text_model("bert").requires_grad_(False).eval(), texts()
    ids = list(range(ROWS))
    batch = collated(data, ids, 10, False)
    wanted = model(**batch).logits
    with PrefixCache(model, Storage(format=kind)) as cache:
        cache.set_boundary(3)
        model(**batch, sample_ids=ids)
        found = model(**batch, sample_ids=ids).logits
        assert cache.use.hits == ROWS
        exact = sum(len(row["input_ids"]) for row in data) * 16 * 4
        assert cache.use.memory_bytes < 0.6 * exact
    assert 0 < (found - wanted).norm() / wanted.norm() < bound


@pytest.mark.parametrize("memory", [0, 2000])
def test_a_cache_larger_than_memory_works(memory: int) -> None:
    build, data, _ = DATA["bert"]
    plain, model = build(), build()
    wanted = trained(plain, epochs(data, 3), lambda _: 2, None, below_of(plain, "bert"))
    with PrefixCache(model, Storage(memory_bytes=memory)) as cache:
        found = trained(model, epochs(data, 3), lambda _: 2, cache, lambda _: [])
        use = cache.use
    assert_close(found, wanted, 1e-5)
    assert use.hits == 2 * ROWS
    assert use.memory_bytes <= memory and use.disk_bytes > 2 * memory


def forwards(model: nn.Module, storage: Storage, count: int = 2) -> tuple[list[Tensor], Any]:
    """Logits of all batches of some epochs."""
    data, found = texts(), []
    with PrefixCache(model, storage) as cache:
        cache.set_boundary(2)
        for _, ids, batch in epochs(data, count):
            found.append(model(**batch, sample_ids=ids).logits)
        return found, cache.use


def test_a_later_run_uses_the_folder(tmp_path: Path) -> None:
    storage = Storage(tmp_path, data="texts")
    first, _ = forwards(text_model("bert").requires_grad_(False).eval(), storage)
    second, use = forwards(text_model("bert").requires_grad_(False).eval(), storage)
    torch.testing.assert_close(second, first)
    assert use.misses == BATCH  # the form of the output is learnt from a first call
    assert use.hits == 2 * ROWS - BATCH


@pytest.mark.parametrize("change", ["weights", "data", "format", "model"])
def test_a_foreign_folder_is_never_used(tmp_path: Path, change: str) -> None:
    forwards(text_model("bert").requires_grad_(False).eval(), Storage(tmp_path))
    model, storage = text_model("bert").requires_grad_(False).eval(), Storage(tmp_path)
    if change == "weights":
        model.bert.encoder.layer[1].output.dense.bias.data[3] += 1e-3
    elif change == "data":
        storage = Storage(tmp_path, data="other")
    elif change == "format":
        storage = Storage(tmp_path, format="bfloat16")
    else:
        model = text_model("roberta").requires_grad_(False).eval()
    wanted = [model(**batch).logits for _, _, batch in epochs(texts(), 1)]
    with pytest.warns(RuntimeWarning, match="are not used"):
        found, use = forwards(model, storage, 1)
    torch.testing.assert_close(found, wanted)
    assert use.misses == ROWS and use.hits == 0


def test_weights_above_the_boundary_are_none_of_its_business(tmp_path: Path) -> None:
    forwards(text_model("bert").requires_grad_(False).eval(), Storage(tmp_path))
    model = text_model("bert").requires_grad_(False).eval()
    model.bert.encoder.layer[2].output.dense.bias.data += 1
    assert forwards(model, Storage(tmp_path))[1].misses == BATCH


def test_a_damaged_entry_is_computed_again(tmp_path: Path) -> None:
    model = text_model("bert").requires_grad_(False).eval()
    first, _ = forwards(model, Storage(tmp_path))
    data = np.fromfile(tmp_path / "activations.bin", np.uint8)
    data[:: len(data) // 5] ^= 255
    data.tofile(tmp_path / "activations.bin")
    with pytest.warns(RuntimeWarning, match="damaged"):
        second, use = forwards(model, Storage(tmp_path))
    torch.testing.assert_close(second, first)
    assert use.misses > BATCH and use.hits > 0


def test_changed_weights_empty_the_cache() -> None:
    model, (batch,) = tiny.bert(3).requires_grad_(False), tiny.tokens()
    ids = {"sample_ids": ["a", "b", "c", "d"]}
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        model(**batch, **ids)
        model.classifier.weight.add_(1)
        model(**batch, **ids)
        assert cache.use.hits == 4
        model.bert.encoder.layer[1].output.dense.weight.mul_(1.5)
        with pytest.warns(RuntimeWarning, match="4 samples are dropped"):
            found = model(**batch, **ids).logits
        cache.paused = True
        torch.testing.assert_close(found, model(**batch).logits)
        assert cache.use.misses == 8


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("adapted", [0, 2])
def test_adapters_matter_where_they_are(adapted: int) -> None:
    """A pass without them, as DPO's reference runs, may read what is stored if they are above."""
    config = LoraConfig(target_modules=["query"], layers_to_transform=[adapted])
    model = get_peft_model(tiny.bert(3), config).requires_grad_(False)
    (batch,) = tiny.tokens()
    batch |= {"sample_ids": ["a", "b", "c", "d"]}
    with PrefixCache(model) as cache, torch.no_grad():
        cache.set_boundary(2)
        model(**batch)
        with model.disable_adapter():
            model(**batch)
        assert cache.use.hits == (4 if adapted == 2 else 0)
        model(**batch)
        assert cache.use.hits == (8 if adapted == 2 else 4)


def prompted(layers: int) -> Any:
    """A decoder whose last `layers` layers have prompts in their attention that matter."""
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=layers)
    model = get_peft_model(text_model("llama"), config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("adaption_gate"):
            parameter.fill_(1.0)
    return model


def named_tokens() -> Batch:
    ids = torch.arange(1, 25).reshape(4, 6)
    return {"input_ids": ids, "sample_ids": ["a", "b", "c", "d"]}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("layers", [1, 3])
def test_prompts_in_attention_that_are_switched_off_matter_where_they_are(layers: int) -> None:
    model = prompted(layers)
    batch = named_tokens()
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        with_them = model(**batch).logits
        with model.disable_adapter(), torch.no_grad():
            found = model(**batch).logits
            assert cache.use.hits == (4 if layers == 1 else 0)
            cache.paused = True
            torch.testing.assert_close(found, model(**batch).logits)
            cache.paused = False
        torch.testing.assert_close(model(**batch).logits, with_them)
        assert cache.use.hits == (8 if layers == 1 else 4)
        assert not torch.allclose(found, with_them)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_prompts_that_come_when_the_prefix_is_known_have_to_be_frozen() -> None:
    model = prompted(3)
    batch = named_tokens()
    with PrefixCache(model) as cache:
        with model.disable_adapter():
            cache.set_boundary(2)
            model(**batch)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("adaption" in name)
        with pytest.warns(RuntimeWarning, match="the activations of 4 samples are dropped"):
            model(**batch)
        with pytest.raises(InputError, match="requires a gradient"):
            model(**batch)


def test_weights_loaded_before_the_end_are_no_matter(tmp_path: Path) -> None:
    """As of the best checkpoint of a run: nothing is dropped, and the folder stays of use."""
    storage = Storage(tmp_path, data="texts")
    model = text_model("bert").requires_grad_(False).eval()
    first, _ = forwards(model, storage)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with PrefixCache(model, storage) as cache:
        cache.set_boundary(2)
        for tensor in model.state_dict().values():
            tensor.mul_(2)
    model.load_state_dict(before)
    second, use = forwards(model, storage)
    torch.testing.assert_close(second, first)
    assert use.hits == 2 * ROWS - BATCH


def test_a_sample_that_changes_is_computed_again() -> None:
    model, (batch,) = tiny.bert(3).requires_grad_(False), tiny.tokens()
    ids = {"sample_ids": torch.arange(4)}
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        model(**batch, **ids)
        batch["input_ids"][2, 3] += 1
        with pytest.warns(RuntimeWarning, match="sample 2 is not what it was"):
            found = model(**batch, **ids).logits
        cache.paused = True
        torch.testing.assert_close(found, model(**batch).logits)
        assert cache.use.changed == 1


def test_a_full_store_leaves_the_rest_uncached() -> None:
    build, data, _ = DATA["bert"]
    plain, model = build(), build()
    wanted = trained(plain, epochs(data, 3), lambda _: 2, None, below_of(plain, "bert"))
    with PrefixCache(model, Storage(memory_bytes=4000, free_bytes=2**62)) as cache:
        with pytest.warns(RuntimeWarning, match="no longer be written"):
            found = trained(model, epochs(data, 3), lambda _: 2, cache, lambda _: [])
        assert 0 < cache.use.samples < ROWS
    assert_close(found, wanted, 1e-5)


def test_a_full_disk_keeps_what_is_on_it(tmp_path: Path) -> None:
    model = text_model("bert").requires_grad_(False).eval()
    with PrefixCache(model, Storage(tmp_path, memory_bytes=0)) as cache:
        cache.set_boundary(2)
        with files_up_to(4000), pytest.warns(RuntimeWarning, match="no longer be written"):
            for epoch, ids, batch in epochs(texts(), 4):
                model(**batch, sample_ids=ids)
                if epoch == 0:
                    stored = cache.use.samples
            assert 0 < stored <= cache.use.samples < ROWS


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        name: (m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks), set(m.__dict__))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["bert.embeddings", "bert.encoder.layer.1", "classifier"])
def test_an_error_leaves_the_model_as_it_was(where: str, error: type[BaseException]) -> None:
    model, (batch,) = tiny.bert(3), tiny.tokens()
    before = snapshot(model)
    freeze(model, 2)
    cache = PrefixCache(model)
    cache.set_boundary(2)

    def fail(*_: object) -> None:
        raise error("stop")

    with model.get_submodule(where).register_forward_hook(fail), pytest.raises(error):
        model(**batch, sample_ids=[0, 1, 2, 3])
    assert cache.skipped == () and cache.use.misses == 0
    assert all(module.training for module in model.modules())
    for _ in range(2):
        model(**batch, sample_ids=[0, 1, 2, 3])
    assert cache.use.hits == 4
    cache.close()
    assert snapshot(model) == before


def test_copies_and_files_are_of_the_model_alone(tmp_path: Path) -> None:
    model, (batch,) = tiny.bert(3).requires_grad_(False).eval(), tiny.tokens()
    wanted, keys = model(**batch).logits, list(model.state_dict())
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        for _ in range(2):
            model(**batch, sample_ids=[0, 1, 2, 3])
        copied, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model.save_pretrained(tmp_path)
        assert list(model.state_dict()) == keys
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    for other in (copied, thawed, model):
        assert snapshot(other) == snapshot(tiny.bert(3).eval())
    for other in (copied, thawed, loaded, model):
        torch.testing.assert_close(other(**batch).logits, wanted)
    copied.bert.encoder.layer[0].output.dense.weight.zero_()
    assert not torch.allclose(copied(**batch).logits, wanted)


def test_other_hooks_see_a_training_model_and_no_ids() -> None:
    model, (batch,) = tiny.bert(3), tiny.tokens()
    freeze(model, 2)
    meter = FlopMeter(model)
    seen: list[tuple[bool, set[str], tuple[str, ...]]] = []

    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        model.register_forward_pre_hook(
            lambda module, _, kwargs: seen.append((module.training, set(kwargs), cache.skipped)),
            with_kwargs=True,
        )
        model(**batch, sample_ids=[0, 1, 2, 3])
        seen.clear()
        spent = meter.spent
        model(**batch, sample_ids=[0, 1, 2, 3])
    assert seen == [(True, set(batch), cache.layers[:2])]
    assert meter.spent == 2 * spent > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain, model, (batch,) = tiny.bert(3), tiny.bert(3), tiny.tokens()
    for each in (plain, model):
        freeze(each, 2)
    plain(**batch).loss.backward()
    tiny.checkpoint_activations(model, use_reentrant=reentrant)
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        for _ in range(2):
            model.zero_grad()
            model(**batch, sample_ids=[0, 1, 2, 3]).loss.backward()
        assert cache.use.hits == 4
    grads = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, msg=name)


@pytest.mark.parametrize("inside", [True, False])
def test_mixed_precision(inside: bool) -> None:
    """Also where the model's own forward turns it on, as Accelerate has it."""
    plain, model = text_model("bert"), text_model("bert")
    for each in (plain, model):
        freeze(each, 2)
        each.eval()
        if inside:
            each.forward = torch.autocast("cpu", torch.bfloat16)(each.forward)
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        for _, ids, batch in epochs(texts(), 3):
            losses = []
            for each, more in ((plain, {}), (model, {"sample_ids": ids})):
                each.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
                    losses.append(each(**batch, **more).loss)
                losses[-1].backward()
            torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
            grads = [dict(each.named_parameters()) for each in (plain, model)]
            for name, parameter in grads[0].items():
                assert (parameter.grad is None) == (grads[1][name].grad is None), name
        assert cache.use.hits == 2 * ROWS and cache.use.checks >= 2


def test_a_change_of_precision_is_a_miss() -> None:
    model, (batch,) = tiny.bert(3).requires_grad_(False), tiny.tokens()
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch, sample_ids=[0, 1, 2, 3])
        with pytest.warns(RuntimeWarning, match="another precision"):
            found = model(**batch, sample_ids=[0, 1, 2, 3]).logits
        torch.testing.assert_close(found, tiny.bert(3)(**batch).logits)


def test_compiled_layers_are_spared_too() -> None:
    torch._dynamo.reset()
    model, (batch,) = tiny.bert(3).requires_grad_(False).eval(), tiny.tokens()
    wanted = model(**batch).logits
    model.bert.encoder.layer[0].compile(backend="eager")
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        model.bert.encoder.layer[1].compile(backend="eager")  # later than the cache
        for _ in range(2):
            found = model(**batch, sample_ids=[0, 1, 2, 3]).logits
            torch.testing.assert_close(found, wanted)
        assert cache.use.hits == 4
    assert all(layer._compiled_call_impl is not None for layer in model.bert.encoder.layer[:2])


def test_a_model_compiled_as_a_whole_is_refused() -> None:
    model = tiny.bert(3)
    with pytest.raises(InputError, match="compile its layers instead"):
        PrefixCache(torch.compile(model, backend="eager"))
    compiled = torch.compile(model, backend="eager")
    with (
        PrefixCache(model.requires_grad_(False)) as cache,
        pytest.raises(InputError, match="whole"),
    ):
        cache.set_boundary(2)
        compiled(**tiny.tokens()[0], sample_ids=[0, 1, 2, 3])
    model.compile(backend="eager")
    with pytest.raises(InputError, match="compile its layers instead"):
        PrefixCache(model)


class Unusual(nn.Module):
    """Layers in a model that uses them in a way that a cache cannot serve."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.norm = nn.BatchNorm1d(6, track_running_stats=False, affine=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        h = self.norm(first) if self.way == "batch" else first
        if self.way == "random":
            torch.rand(3)
        for block in self.blocks[1:]:
            h = h.mul_(1.5) if self.way == "in place" else h
            h = block.a(h) if self.way == "parts" else block(h)
        return self.head(h + first if self.way == "early" else h)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("early", "uses more of its first layers"),
        ("batch", "influence each other"),
        ("parts", "was not called"),
    ],
)
@pytest.mark.parametrize("mode", ["error", "warn"])
def test_models_that_cannot_be_served_are_refused(way: str, reason: str, mode: str) -> None:
    torch.manual_seed(0)
    model = Unusual(way).requires_grad_(False)
    data = images(6, name="x")
    with PrefixCache(model, mode=mode) as cache:
        cache.set_boundary(2)
        if mode == "error":
            with pytest.raises(InputError, match=reason):
                for _, ids, batch in epochs(data, 2):
                    model(batch["x"], sample_ids=ids)
            return
        with pytest.warns(RuntimeWarning, match=reason):
            found = [model(batch["x"], sample_ids=ids) for _, ids, batch in epochs(data, 3)]
        assert cache.refused is not None
        wanted = [model(batch["x"]) for _, _, batch in epochs(data, 3)]
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("way", ["in place", "random"])
def test_other_models_are_served_exactly(way: str) -> None:
    """Hidden states are stored before the model changes them; random numbers stay in step."""
    torch.manual_seed(0)
    model, data = Unusual(way), images(6, name="x")
    freeze(model, 2)
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        for _, ids, batch in epochs(data, 3):
            cache.paused = True
            torch.manual_seed(0)
            wanted = model(batch["x"]), torch.rand(3)
            cache.paused = False
            torch.manual_seed(0)
            found = model(batch["x"], sample_ids=ids), torch.rand(3)
            torch.testing.assert_close(found, wanted)
        assert cache.use.hits == 2 * ROWS


def albert(groups: int) -> nn.Module:
    """Four layers of which several are the same one, with dropout."""
    config = transformers.AlbertConfig(
        vocab_size=40,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_hidden_groups=groups,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        classifier_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.AlbertForSequenceClassification(config)
    return model.requires_grad_(False)


def test_a_layer_that_is_called_again_runs_without_dropout() -> None:
    model, batch = albert(1), collated(texts(), [0, 1, 2, 3], 12, False)
    wanted = model.eval()(**batch).logits
    model.train()
    with PrefixCache(model) as cache:
        cache.set_boundary(1)
        for _ in range(2):
            found = model(**batch, sample_ids=[0, 1, 2, 3]).logits
            torch.testing.assert_close(found, wanted)
        assert cache.use.hits == 4


def test_layers_that_are_called_again_at_several_boundaries() -> None:
    model, data = albert(2).eval(), texts()
    batch = collated(data, [0, 1, 2], 12, False)
    wanted = model(**batch).logits
    with PrefixCache(model) as cache:
        assert len(cache.layers) == 2
        cache.set_boundary(1)
        model(**batch, sample_ids=[0, 1, 2])
        cache.set_boundary(2)
        model(**collated(data, [1], 12, False), sample_ids=[1])
        # what is stored for sample 1 is behind the last call of the second layer
        torch.testing.assert_close(model(**batch, sample_ids=[0, 1, 2]).logits, wanted)
        torch.testing.assert_close(model(**batch, sample_ids=[0, 1, 2]).logits, wanted)
        assert cache.use.hits == 3


def test_positions_counted_through_left_padding_are_refused() -> None:
    model = text_model("gpt2").requires_grad_(False)
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        with pytest.raises(InputError, match="counted through the padding"):
            for _, ids, batch in epochs(texts(), 2, left=True):
                model(**batch, sample_ids=ids)


def test_given_positions_make_left_padding_exact() -> None:
    model = text_model("gpt2").requires_grad_(False).eval()
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        for _, ids, batch in epochs(texts(), 3, left=True):
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            model(**batch, position_ids=positions, sample_ids=ids)
        assert cache.use.hits == 2 * ROWS


def test_t5_is_refused_with_the_reason() -> None:
    model = FAMILIES["t5"]().requires_grad_(False)
    with PrefixCache(model) as cache:
        assert cache.layers == ("encoder.block.0", "encoder.block.1")
        cache.set_boundary(1)
        with pytest.raises(InputError, match=r"layer 'encoder.block.0' puts out 2 tensors"):
            model(**BATCHES["t5"](), sample_ids=[0, 1])


def test_hidden_states_that_are_asked_for_are_refused() -> None:
    model, (batch,) = tiny.bert(3).requires_grad_(False), tiny.tokens()
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        with pytest.raises(InputError, match="uses more of its first layers"):
            model(**batch, output_hidden_states=True, sample_ids=[0, 1, 2, 3])


def test_the_encoder_of_two_is_cached_under_padding() -> None:
    model, data = text_model("bart").requires_grad_(False).eval(), texts(ends=2)
    with PrefixCache(model) as cache:
        assert len(cache.layers) == 4 and all("encoder" in name for name in cache.layers)
        cache.set_boundary(4)
        for _, ids, batch in epochs(data, 3):
            found = model(**batch, sample_ids=ids).logits
            cache.paused = True
            torch.testing.assert_close(found, model(**batch).logits, rtol=1e-5, atol=1e-5)
            cache.paused = False
        assert cache.use.hits == 2 * ROWS


def test_a_prefix_that_trains_is_refused_and_can_be_probed() -> None:
    model, (batch,) = tiny.bert(3), tiny.tokens()
    freeze(model, 2)
    ids = {"sample_ids": [0, 1, 2, 3]}
    with PrefixCache(model) as cache:
        cache.set_boundary(2)
        model(**batch, **ids)
        model.bert.encoder.layer[1].requires_grad_(True)
        with pytest.raises(InputError, match=r"'bert\.encoder\.layer\.1\..*set paused"):
            model(**batch, **ids)
        cache.paused = True
        model(**batch, **ids).loss.backward()
        assert model.bert.encoder.layer[1].output.dense.weight.grad is not None
        cache.paused = False
        with torch.no_grad():
            model(**batch, **ids)
        assert cache.use.hits == 4


def test_generation_is_left_alone() -> None:
    model, data = FAMILIES["llama"]().requires_grad_(False).eval(), BATCHES["llama"]()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with PrefixCache(model) as cache:
        cache.set_boundary(1)
        for _ in range(2):
            model(**data, sample_ids=[0, 1])
        again = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(again, wanted)
        assert cache.use.hits == 2


def test_misuse_is_told() -> None:
    model, (batch,) = tiny.bert(3), tiny.tokens()
    freeze(model, 2)
    with pytest.raises(InputError, match="mode is 'off'"):
        PrefixCache(model, mode="off")
    with PrefixCache(model) as cache:
        with pytest.raises(InputError, match="has a prefix cache already"):
            PrefixCache(model)
        with pytest.raises(InputError, match="boundary is 4; this model has 3 layers"):
            cache.set_boundary(4)
        cache.set_boundary(2)
        with pytest.warns(RuntimeWarning, match="has no 'sample_ids'"):
            model(**batch)
        with pytest.raises(InputError, match="3 sample ids came with a batch of 4"):
            model(**batch, sample_ids=[1, 2, 3])
        with pytest.raises(InputError, match=r"1\.5 is no sample id"):
            model(**batch, sample_ids=[1.5, 2, 3, 4])
        square = torch.ones(4, 1, 7, 7)
        with pytest.raises(InputError, match=r"shape \[4, 1, 7, 7\]"):
            model(**{**batch, "attention_mask": square}, sample_ids=[1, 2, 3, 4])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_content_hashes_see_everything_but_padding(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    shape = (50, 6) if dtype == torch.int64 else (50, 6, 3)
    values = (torch.randn(shape, generator=random) * 9).to(dtype)
    mask = torch.ones(50, 6, dtype=torch.bool)
    hashes = content_hashes(values, mask)
    assert len(set(hashes.tolist())) == 50
    junk = torch.full_like(values[:, :2], 7)
    blank = torch.zeros(50, 2, dtype=torch.bool)
    for side in (0, 1):
        padded = torch.cat([values, junk] if side else [junk, values], 1)
        real = torch.cat([mask, blank] if side else [blank, mask], 1)
        assert torch.equal(content_hashes(padded, real), hashes)
    for place in range(6):
        changed = values.clone()
        changed[:, place] = changed[:, (place + 1) % 6]
        differs = (changed != values).flatten(1).any(1)
        assert torch.equal(content_hashes(changed, mask) != hashes, differs)
    shorter = mask.clone()
    shorter[:, -1] = False
    assert not (content_hashes(values, shorter) == hashes).any()
