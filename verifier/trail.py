"""What each node's check saw, written down for the pages and figures of the record; no verdict depends on it.

A trail is one JSON document, deflated: a line of columns for every node, and the rows that were drawn, of each draw the
first ones.
"""

import json
import math
import zlib
from collections.abc import Sequence
from itertools import accumulate
from time import perf_counter
from typing import Any

from gpu.ops.call import Measure, RowIds
from gpu.plan import registry_row
from proof.encoding import parse
from proof.errors import Malformed
from proof.graph import Node
from verifier.checks import How

MAX_TRAIL_BYTES = 4 * 2**20  # of JSON; what is stored is smaller
MAX_ROWS = 64  # of a draw that are kept
MAX_DRAWS = 256  # nodes share them: there is one for each number of rows, and those of ops that draw their own
ROOM = 2**19  # bytes for all that is not nodes: 256 draws of 64 numbers fit
LEVEL = 1  # of deflation: a trail is written for every task and read for few

COLUMNS = ("index", "name", "op", "family", "how", "entries", "determined", "ratio", "draw")
Document = dict[str, Any]


class Trail:
    """The watcher of one verification. Seconds go to the family of the node, or to the step, that they led up to."""

    def __init__(self) -> None:
        self._seen: list[tuple[Node, str, How, Measure | None, RowIds, int]] = []
        self._seconds: dict[str, float] = {}
        self._last = perf_counter()

    def passed(self, step: str) -> None:
        now = perf_counter()
        self._seconds[step] = self._seconds.get(step, 0.0) + now - self._last
        self._last = now

    def saw(self, node: Node, how: How, measure: Measure | None, rows: RowIds, of: int) -> None:
        family = str(registry_row(node).family)
        self._seen.append((node, family, how, measure, rows, of))
        self.passed(family)

    def seconds_by_family(self) -> dict[str, float]:
        """Seconds by op family; `openings` are the steps before all nodes, `offers` the way to a device."""
        return dict(self._seconds)

    def packed(self) -> bytes:
        """At most MAX_TRAIL_BYTES before deflation: of too many nodes those in the middle are left out."""
        draws: dict[tuple[int, int, bytes], int] = {}
        shown: list[Document] = []
        lines = []
        for node, family, how, measure, rows, of in self._seen:
            draw = _draw(rows, of, draws, shown)
            lines.append(_json([node.index, node.name, node.op, family, how, *_measured(measure), draw]))
        kept = _ends(lines, MAX_TRAIL_BYTES - ROOM)
        rest = {
            "draws": shown,
            "left_out": len(lines) - len(kept),
            "seconds": {family: round(seconds, 6) for family, seconds in self._seconds.items()},
        }
        return zlib.compress(f'{{"nodes":[{",".join(kept)}],{_json(rest)[1:]}'.encode(), LEVEL)


def unpacked(data: bytes) -> Document:
    """`nodes` as objects of COLUMNS, the last one refused if any was; `draws`, `left_out` and `seconds`.

    `draw` of a node is its place in `draws`; `ratio` is the largest |claimed - exact| / radius, None for none.
    Raises Malformed for anything but a packed trail.
    """
    inflating = zlib.decompressobj()
    try:
        plain = inflating.decompress(data, MAX_TRAIL_BYTES + 1)
    except zlib.error as error:
        raise Malformed(f"trail: {error}") from None
    document = parse(plain, "trail", MAX_TRAIL_BYTES)
    if not isinstance(document, dict) or not isinstance(document.get("nodes"), list):
        raise Malformed("trail: not an object with nodes")
    if any(not isinstance(line, list) or len(line) != len(COLUMNS) for line in document["nodes"]):
        raise Malformed(f"trail: a node has not {len(COLUMNS)} columns")
    return document | {"nodes": [dict(zip(COLUMNS, line, strict=True)) for line in document["nodes"]]}


def _measured(measure: Measure | None) -> tuple[int, int, float | None]:
    if measure is None:
        return 0, 0, None
    return measure.entries, measure.determined, float(measure.ratio) if math.isfinite(measure.ratio) else None


def _draw(rows: RowIds, of: int, known: dict[tuple[int, int, bytes], int], shown: list[Document]) -> int | None:
    """The place of a draw in `shown`, where it is put if it is new; None if there is none, or no room for it."""
    if not len(rows):
        return None
    first = rows[:MAX_ROWS]
    key = of, len(rows), first.tobytes()
    if key not in known and len(shown) < MAX_DRAWS:
        known[key] = len(shown)
        shown.append({"of": of, "count": len(rows), "rows": first.tolist()})
    return known.get(key)


def _ends(lines: Sequence[str], room: int) -> list[str]:
    """Lines, of ASCII, from both ends: half of the room is for each."""
    sizes = [len(line) + 1 for line in lines]
    if sum(sizes) <= room:
        return list(lines)
    last = sum(1 for total in accumulate(reversed(sizes)) if total <= room // 2)
    first = sum(1 for total in accumulate(sizes) if total <= room // 2)
    return [*lines[:first], *lines[len(lines) - last :]]


_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
