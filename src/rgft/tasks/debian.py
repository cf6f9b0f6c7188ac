"""Fetching files of a Debian package through apt, without installing it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rgft.errors import InputError
from rgft.tasks.tables import one_line

_SECONDS = 300


def download_files(package: str, members: Sequence[str]) -> dict[str, bytes]:
    """Files of a package, fetched by apt-get from whatever archive it is configured for.

    Args:
        package: Name of the package.
        members: Paths of the files in it, without a leading slash.

    Raises:
        InputError: It cannot be fetched or unpacked, or a file is not in it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Console(stderr=True).status(f"downloading {package} with apt-get"):
            _run(package, ["apt-get", "download", "--quiet=2", package], folder)
        archives = list(folder.glob("*.deb"))
        if len(archives) != 1:
            raise InputError(f"apt-get left no file of the package {package}; install it instead")
        _run(package, ["dpkg-deb", "--extract", archives[0].name, "content"], folder)
        found = {member: folder / "content" / member for member in members}
        for member, path in found.items():
            if not path.is_file() or path.is_symlink():
                raise InputError(f"the package {package} has no file {member}; install another")
        return {member: path.read_bytes() for member, path in found.items()}


def _run(package: str, command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as problem:
        raise InputError(
            f"{command[0]} gave no answer for {package} within {_SECONDS} seconds; try again"
        ) from problem
    except OSError as problem:
        raise InputError(
            f"{package} needs {command[0]}, which cannot be run here ({problem.strerror}); "
            "get its files another way"
        ) from problem
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        reason = one_line((lines or [f"exit code {done.returncode}"])[-1])
        raise InputError(f"{command[0]} could not get {package} ({reason}); go online")
