"""Reading checkpoints of torch.distributed.checkpoint without running code from them."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

from rgft.errors import InputError


def _forgotten(*parts: str) -> None:
    """In place of a path, which no one asks for."""
    del parts


ADMITTED = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        *(Metadata, MetadataIndex, StorageMeta, _StorageInfo, _MEM_FORMAT_ENCODING),
        *(TensorStorageMetadata, TensorProperties, ChunkStorageMetadata, _get_layout),
    )
} | {
    ("torch", "Size"): torch.Size,
    **{  # where it was saved, of whatever system and Python
        (module, name): _forgotten
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}


class TensorReader(FileSystemReader):
    """Reads checkpoints that hold nothing but tensors; torch's own unpickles whatever there is."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What there is, and where.

        Raises:
            InputError: It is damaged, or refers to anything but tensors.
        """
        del args, kwargs
        with self._get_metadata_path().open("rb") as file:  # type: ignore[attr-defined]
            metadata = self._unpickled(file)
        if not isinstance(metadata, Metadata) or not all(
            isinstance(entry, TensorStorageMetadata)
            for entry in metadata.state_dict_metadata.values()
        ):
            raise InputError(damaged(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _unpickled(self, file: Any) -> Any:
        try:
            return _Unpickler(file).load()
        except InputError:
            raise
        except Exception as error:  # a damaged pickle may end in any
            raise InputError(damaged(self.path)) from error


class _Unpickler(pickle.Unpickler):
    """Knows torch's metadata, and nothing that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        found = vars(torch).get(name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise InputError(
            f"the metadata of the checkpoint asks for {module}.{name}, which no checkpoint of "
            "save_checkpoint has; do not trust it, and give another"
        )


def damaged(path: Any) -> str:
    """What is said of a file or folder that cannot be read."""
    return f"{path} is damaged, or no checkpoint of save_checkpoint; give another"
