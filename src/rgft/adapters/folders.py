"""Folders of a saved model that something was added to."""

from __future__ import annotations

ADAPTER = "adapter"  # what was added
BASE = "base"  # the model without it, where the two cannot be merged
