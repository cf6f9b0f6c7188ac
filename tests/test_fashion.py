"""Fashion-MNIST: from the authors' files, from a Debian package, and where there is neither."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest

from rgft.errors import InputError
from rgft.tasks import fashion, load_task
from rgft.tasks.images import decode_image

ROWS = {"train": 200, "test": 20}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few images in the format of the four files, and nothing else on this machine."""
    folder, random = tmp_path / "files", np.random.default_rng(0)
    folder.mkdir()
    hashes = {}
    for split, (images, labels) in fashion.FILES.items():
        count = ROWS[split]
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        sizes = np.array([2051, count, 28, 28], ">i4").tobytes()
        classes = np.arange(count, dtype=np.uint8) % 10
        for name, content in (
            (images, sizes + pixels.tobytes()),
            (labels, np.array([2049, count], ">i4").tobytes() + classes.tobytes()),
        ):
            (folder / name).write_bytes(gzip.compress(content))
            hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(fashion, "SHA256", hashes)
    monkeypatch.setattr(fashion, "INSTALLED", Path("/usr/share/datasets/not-there"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RGFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RGFT_DATA", raising=False)
    return folder


def test_images_are_those_of_the_files(files: Path) -> None:
    task = load_task("fashion-mnist", files)
    assert {name: len(rows) for name, rows in task.splits.items()} == {
        "train": 180,
        "validation": 20,
        "test": 20,
    }
    content = gzip.decompress((files / fashion.FILES["test"][0]).read_bytes())
    pixels = np.frombuffer(content[16:], np.uint8).reshape(-1, 28, 28)
    for row, wanted in zip(task.splits["test"], pixels, strict=True):
        image = np.asarray(decode_image(row["image"], "a row"))
        assert (image == wanted[..., None]).all()
    assert task.splits["test"]["label"][:] == [i % 10 for i in range(20)]
    assert task.label_names[9] == "Ankle boot"


def test_a_damaged_file_is_said(files: Path) -> None:
    path = files / fashion.FILES["train"][0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="is damaged or another file"):
        load_task("fashion-mnist", files)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages are Debian's")
def test_files_come_out_of_the_package_and_stay(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package made here, which a stand-in for apt-get copies as apt-get would download it."""
    content = tmp_path / "package"
    shutil.copytree(files, content / "usr" / "share" / "datasets" / "not-there")
    (content / "DEBIAN").mkdir()
    (content / "DEBIAN" / "control").write_text(
        f"Package: {fashion.PACKAGE}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\n"
        "Description: images\n"
    )
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(content), str(tmp_path / "made.deb")],
        check=True,
        capture_output=True,
    )
    tool = tmp_path / "bin" / "apt-get"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\n[ "$1" = download ] && cp {tmp_path / "made.deb"} {"$3"}_1_all.deb\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    assert len(load_task("fashion-mnist").splits["train"]) == 180
    tool.unlink()
    assert len(load_task("fashion-mnist").splits["train"]) == 180  # from the cache
    assert fashion.is_available()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "apt-get, which cannot be run here"),
        ("echo 'E: Unable to locate package' >&2; exit 100", "(E: Unable to locate package)"),
        ("exit 0", "apt-get left no file"),
        ("echo broken > x.deb", "dpkg-deb could not"),
    ],
)
def test_where_there_is_neither_package_nor_hub(
    script: str | None, said: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del files
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in (("apt-get", script), ("dpkg-deb", "echo 'dpkg-deb: error' >&2; exit 2")):
        if body is not None:
            (tools / name).write_text(f"#!/bin/sh\n{body}\n")
            (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(InputError) as caught:
        load_task("fashion-mnist")
    message = str(caught.value)
    assert said in message and "Debian package dataset-fashion-mnist" in message
    assert "$RGFT_DATA/fashion-mnist" in message and "\n" not in message


@pytest.mark.skipif(
    not os.environ.get("RGFT_DATA") or not fashion.is_available(),
    reason="Fashion-MNIST is not on this machine, or RGFT_DATA is not set",
)
def test_as_published() -> None:
    task = load_task("fashion-mnist")
    assert {name: len(rows) for name, rows in task.splits.items()} == {
        "train": 54_000,
        "validation": 6_000,
        "test": 10_000,
    }
    test = task.splits["test"]["label"][:]
    assert all(test.count(label) == 1000 for label in range(10))
