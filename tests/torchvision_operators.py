"""Lets torchvision be imported where its compiled half does not load: imported before all else.

Where torchvision is installed, transformers imports it. For torch without CUDA the package index
has no build of its compiled half, and torchvision describes two operators of that half as it is
imported. They are declared here, and stay without code: nothing here calls them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch


def _declare() -> torch.library.Library | None:
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


DECLARED = _declare()  # the operators go when this goes
