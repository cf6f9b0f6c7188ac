"""Hidden states kept per sample: in memory up to a bound, the rest in a file."""

from rgft.activations.encoding import FORMATS
from rgft.activations.index import Key
from rgft.activations.store import ActivationStore

__all__ = ["FORMATS", "ActivationStore", "Key"]
