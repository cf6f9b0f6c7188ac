"""Fashion-MNIST (Xiao et al. 2017, MIT licence): articles of clothing, 28 x 28 pixels in grey.

It comes from the hub's tables or from the four files of its authors, which a Debian package holds.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

from rgft.errors import InputError
from rgft.tasks import hub
from rgft.tasks.archive import checked
from rgft.tasks.cache import cache_home, store
from rgft.tasks.debian import download_files
from rgft.tasks.tables import Table
from rgft.tasks.task import TaskData

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SHA256 = {
    FILES["train"][0]: "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    FILES["train"][1]: "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    FILES["test"][0]: "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    FILES["test"][1]: "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
SIDE = 28

FASHION = hub.HubTask(
    name="fashion-mnist",
    description="which article of clothing, 10 classes (Fashion-MNIST, Xiao et al. 2017)",
    path="zalando-datasets/fashion_mnist",
    config="fashion_mnist",
    folders=("fashion-mnist", "fashion_mnist"),
    input_columns=("image",),
    label_names=(
        *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    modality="image",
)


def load_fashion(data: Path | None = None) -> TaskData:
    """Load it from a folder, the installed package, the cache, the package's archive, or the hub.

    Args:
        data: Folder with the authors' four files, or with tables as on the hub.

    Raises:
        InputError: It is in none of these places, or a file is damaged.
    """
    folder = data if data is not None else _found()
    if folder is not None and not _holds_files(folder):
        return hub.load_hub_task(FASHION, folder)
    if folder is None:
        folder = cache_home() / FASHION.name
        try:
            _fetch(folder)
        except InputError as problem:
            return _from_hub(problem)
    tables = {split: _table(folder, *names) for split, names in FILES.items()}
    return hub.from_tables(FASHION, tables, str(folder))


def is_available() -> bool:
    """Whether it can be loaded without the network."""
    return _found() is not None or hub.is_available(FASHION)


def _found() -> Path | None:
    named = hub.local_folder(FASHION)
    if named is not None:
        return named
    return next((f for f in (INSTALLED, cache_home() / FASHION.name) if _holds_files(f)), None)


def _holds_files(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SHA256)


def _fetch(folder: Path) -> None:
    """Into the cache from the package, which is not installed by that."""
    members = {name: f"{INSTALLED.relative_to('/')}/{name}" for name in SHA256}
    contents = download_files(PACKAGE, list(members.values()))
    for name, member in members.items():
        store(folder / name, checked(contents[member], SHA256[name], name))


def _from_hub(problem: InputError) -> TaskData:
    try:
        return hub.load_hub_task(FASHION)
    except InputError as other:
        raise InputError(f"{other}; or install the Debian package {PACKAGE} ({problem})") from other


def _table(folder: Path, images: str, labels: str) -> Table:
    pixels, classes = _content(folder / images, 16), _content(folder / labels, 8)
    files = [{"bytes": image, "path": None} for image in _pictures(pixels)]
    return Table(str(folder / images), {"image": files, "label": list(classes)})


def _pictures(pixels: bytes) -> Iterator[bytes]:
    """Each image as a file of its own, in the simplest format there is (PGM)."""
    header = f"P5 {SIDE} {SIDE} 255\n".encode()
    for start in range(0, len(pixels), SIDE * SIDE):
        yield header + pixels[start : start + SIDE * SIDE]


def _content(path: Path, header: int) -> bytes:
    """What follows the header, whose sizes need no look: the hash says what the file is."""
    packed = checked(path.read_bytes(), SHA256[path.name], str(path))
    return gzip.decompress(packed)[header:]
