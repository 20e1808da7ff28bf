"""What a check saw, as a drawing: every node of the graph in order, how close it came to its threshold, and its family.

Lengths are units of the drawing. A graph with more nodes than columns has several nodes a column: the worst is shown.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gpu.ops.call import Family
from verifier.checks import How

GUTTER, PLOT_WIDTH = 92, 1028  # for labels at the left; for nodes
HEADROOM, PLOT_HEIGHT, LANE, FOOT = 18, 150, 11, 22  # above the threshold; up to it; of each family; for layers
MAX_COLUMNS = 514
LEAST_DECADE = -9  # ratios below 1e-9 are drawn as that
WIDEN = 3.0  # least width of a refused node, so that it is seen
STUB = 3  # height of a node that has no ratio
LARGEST = 50  # nodes that are told in a table
LEAST_LAYER = 16  # width of a layer that has room for its number

_LAYER = re.compile(r"(?:^|[/._-])(?:layers?|blocks?|h)[/._-]?(\d{1,4})(?=[/._-])")
Seen = dict[str, Any]  # a node of an unpacked trail


@dataclass(frozen=True)
class Bar:
    x: float
    width: float
    y: float
    height: float
    how: str
    lane: float | None  # top of the mark of its family
    words: str


@dataclass(frozen=True)
class Band:
    """A layer: nodes in a row that carry its number."""

    x: float
    width: float
    label: str
    odd: bool


@dataclass(frozen=True)
class Picture:
    bars: Sequence[Bar]
    bands: Sequence[Band]
    decades: Sequence[tuple[float, str]]  # height of a line, and its label
    lanes: Sequence[tuple[float, str]]  # top of a lane, and its family
    hows: Sequence[str]  # that occur, for the legend
    together: int  # nodes a column

    width = GUTTER + PLOT_WIDTH
    left = GUTTER
    threshold = HEADROOM
    floor = HEADROOM + PLOT_HEIGHT

    @property
    def height(self) -> int:
        return HEADROOM + PLOT_HEIGHT + 8 + LANE * len(self.lanes) + FOOT


@dataclass(frozen=True)
class Strip:
    """Which rows of how many were drawn."""

    of: int
    count: int
    rows: Sequence[int]  # the first of them
    width: float  # of one row's mark

    def x(self, row: int) -> float:
        return round(row / self.of * PLOT_WIDTH, 2)


@dataclass(frozen=True)
class Share:
    """What the verdict says of one op family, and the trail of its nodes and seconds."""

    family: str
    nodes: int
    entries: int
    determined: int
    largest: float | None
    seconds: float | None


def families(nodes: Sequence[Seen], verdict: Seen, seconds: Mapping[str, float]) -> list[Share]:
    counted = Counter(node["family"] for node in nodes)
    return [
        Share(
            family=family,
            nodes=counted[family],
            entries=verdict["entries"].get(family, 0),
            determined=verdict["determined"].get(family, 0),
            largest=verdict["largest"].get(family),
            seconds=seconds.get(family),
        )
        for family in map(str, Family)
        if family in counted or family in verdict["entries"]
    ]


def picture(nodes: Sequence[Seen]) -> Picture:
    """The nodes of a trail, at least one."""
    together = math.ceil(len(nodes) / MAX_COLUMNS)
    columns = [nodes[i : i + together] for i in range(0, len(nodes), together)]
    lowest = _lowest(nodes)
    families = [family for family in Family if any(node["family"] == family for node in nodes)]
    tops = {str(family): HEADROOM + PLOT_HEIGHT + 8 + LANE * i for i, family in enumerate(families)}
    step = PLOT_WIDTH / len(columns)
    every = 1 if lowest >= -4 else 2
    return Picture(
        bars=[_bar(column, GUTTER + i * step, step, lowest, tops) for i, column in enumerate(columns)],
        bands=_bands(columns, step),
        decades=[(round(_height(10.0**k, lowest), 2), _power(k)) for k in range(0, lowest - 1, -every)],
        lanes=[(top, family) for family, top in tops.items()],
        hows=[how for how in How if any(node["how"] == how for node in nodes)],
        together=together,
    )


def largest(nodes: Sequence[Seen]) -> list[Seen]:
    """The refused node, then those that came closest to their thresholds."""
    told = [node for node in nodes if node["ratio"] or node["how"] == How.REFUSED]
    return sorted(told, key=_badness, reverse=True)[:LARGEST]


def strips(draws: Sequence[Seen]) -> list[Strip]:
    """Draws, those from most rows first."""
    ordered = sorted(draws, key=lambda draw: (-draw["of"], -draw["count"]))
    return [
        Strip(draw["of"], draw["count"], draw["rows"], round(max(PLOT_WIDTH / draw["of"] - 1, 2.0), 2))
        for draw in ordered
    ]


def _badness(node: Seen) -> tuple[bool, float]:
    return node["how"] == How.REFUSED, node["ratio"] or 0.0


def _lowest(nodes: Sequence[Seen]) -> int:
    """The decade that the drawing starts from."""
    ratios = [node["ratio"] for node in nodes if node["ratio"]]
    return max(math.floor(math.log10(min(ratios))), LEAST_DECADE) if ratios else -2


def _height(ratio: float, lowest: int) -> float:
    """Where a ratio lies, from the top: 1 at the threshold, the lowest decade at the floor."""
    exponent = min(max(math.log10(ratio), lowest), 0.0)
    return HEADROOM + PLOT_HEIGHT * exponent / min(lowest, -1)


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"{10.0**exponent:g}"


def _bar(column: Sequence[Seen], x: float, step: float, lowest: int, tops: dict[str, int]) -> Bar:
    worst = max(column, key=_badness)
    floor = HEADROOM + PLOT_HEIGHT
    if worst["how"] == How.REFUSED:
        y = 0.0
    elif worst["ratio"]:
        y = min(_height(worst["ratio"], lowest), floor - STUB)
    else:
        y = floor - STUB
    width = max(step * 0.8, WIDEN if worst["how"] == How.REFUSED else 1.0)
    return Bar(
        x=round(min(x, GUTTER + PLOT_WIDTH - width), 2),
        width=round(width, 2),
        y=round(y, 2),
        height=round(floor - y, 2),
        how=worst["how"],
        lane=tops.get(worst["family"]),
        words=_words(worst, len(column)),
    )


def _words(node: Seen, among: int) -> str:
    said = f"{node['name']} ({node['op']}), {node['how']}"
    if node["ratio"]:
        said += f": {node['ratio']:.3g} of its threshold"
    elif node["ratio"] is not None:
        said += ": exact"
    return f"{said}; the most of {among} nodes" if among > 1 else said


def _bands(columns: Sequence[Sequence[Seen]], step: float) -> list[Band]:
    found: list[Band] = []
    runs = groupby(enumerate(columns), key=lambda pair: _layer(pair[1][0]["name"]))
    for number, run in runs:
        places = [i for i, _ in run]
        if number is not None:
            width = len(places) * step
            label = number if width >= LEAST_LAYER else ""
            found.append(Band(round(GUTTER + places[0] * step, 2), round(width, 2), label, len(found) % 2 == 1))
    return found


def _layer(name: str) -> str | None:
    found = _LAYER.search(name)
    return found[1] if found else None
