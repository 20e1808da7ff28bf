"""CUDA sources: one purpose a file, a contract on top, compiled at first use and for every kernel in the tests.

`#include "name.cuh"` is replaced by that file, once, so that every compiler is given one text. Contraction is off: a
source that wants a fused multiply-add says `fma`, and so gives the same bits on every machine, exp and its like apart.
"""

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
OPTIONS = ("--std=c++17", "--fmad=false")

_INCLUDE = re.compile(r'^#include "([a-z0-9_]+\.cuh)"\n', re.MULTILINE)


def files() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


@cache
def text(file: str) -> str:
    """The whole source of kernels/`file`.cu."""
    return _joined(f"{file}.cu", set())


def _joined(name: str, seen: set[str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    return _INCLUDE.sub(lambda match: _joined(match[1], seen), (FOLDER / name).read_text())
