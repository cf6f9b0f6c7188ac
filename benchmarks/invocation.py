"""How a benchmark was called, for its record."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def invocation(script: str, *places: str) -> str:
    """The command without the options that name files: those are of one machine.

    Args:
        script: Path of the script.
        places: The options that are left out, with the one value that each has.
    """
    parser = argparse.ArgumentParser(add_help=False)
    for place in places:
        parser.add_argument(place)
    _, rest = parser.parse_known_args(sys.argv[1:])
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *rest])
