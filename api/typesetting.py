"""Pages from templates: Jinja with every value escaped, the words that numbers are shown in, and the static files."""

from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from importlib.resources import files
from math import isfinite, log10
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from proof.errors import Reason
from verifier.checks import How
from verifier.lifecycle import Stage

MEDIA_TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
STATIC: Mapping[str, bytes] = {
    entry.name: entry.read_bytes()
    for entry in (files("api") / "static").iterdir()
    if entry.name.rpartition(".")[2] in MEDIA_TYPES
}

STAGES = {
    Stage.POSTED: "waits for a worker",
    Stage.CHALLENGED: "a worker committed and must open its work",
    Stage.CHECKING: "the proof is being checked",
    Stage.ACCEPTED: "accepted; to be signed",
    Stage.REJECTED: "refused; to be signed",
    Stage.ATTESTED: "the verdict is signed",
    Stage.LAPSED: "the deadline passed; to be signed",
    Stage.EXPIRED: "that the deadline passed is signed",
    Stage.STALLED: "a fault of ours: nobody is paid or punished",
}
REASONS = {
    Reason.BINDING: "The proof belongs to another task, commitment, challenge or model.",
    Reason.SIGNATURE: "The commitment is not signed by the worker that it names.",
    Reason.SHAPE: "What was committed to has other tensors, dtypes or shapes than the graph gives.",
    Reason.INPUT: "The run did not start from the task's inputs.",
    Reason.SELECTION: "Other rows were opened than the challenge selects.",
    Reason.OPENING: "Opened rows do not lie under the root that was committed to.",
    Reason.NONFINITE: "There is a NaN or an infinity where the op gives none.",
    Reason.FREIVALDS: "A matrix product fails its random combination: it is not the product of its factors.",
    Reason.REEXECUTION: "A row computed again gives another result.",
}
HOWS = {
    How.CHECKED: "checked on the CPU",
    How.CLEARED: "cleared by the GPU",
    How.KEYED: "checked with a secret key",
    How.DERIVED: "follows from shapes: nothing is claimed",
    How.REPLAYED: "computed again for a later check",
    How.REFUSED: "refused",
}


def page(template: str, **values: Any) -> str:
    return _templates.get_template(template).render(values)


def short(value: str | None) -> str:
    """A digest or address that is recognised by its ends."""
    if value is None:
        return "–"
    start = 10 if value.startswith("0x") else 8
    return f"{value[:start]}…{value[-4:]}" if len(value) > start + 5 else value


def grouped(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def seconds(value: float | None) -> str:
    """A duration in the unit that suits it."""
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.3g}\u00a0ms"
    if value < 60:
        return f"{value:.3g}\u00a0s"
    minutes, left = divmod(round(value), 60)
    return f"{minutes}\u00a0min {left}\u00a0s"


def ago(value: float) -> str:
    """How long something has taken or is past, roughly; less than a second, or in the future, is now."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if value >= length:
            return f"{int(value // length)}\u00a0{unit}"
    return "now"


def ahead(value: float) -> str:
    return f"in {ago(value)}" if value > 0 else f"{ago(-value)} ago"


def stamp(value: float) -> str:
    """Unix seconds as a moment in UTC."""
    try:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # a deadline may be any integer
        return str(value)


def iso(value: float) -> str:
    """A moment as <time> takes it."""
    return stamp(value).replace(" UTC", "Z").replace(" ", "T")


def percent(value: float) -> str:
    """A share, rounded so that all is only what is all."""
    return "100\u00a0%" if value >= 1 else f"{min(value, 0.9999) * 100:.4g}\u00a0%"


def ratio(value: float | None) -> str:
    return "–" if value is None or not isfinite(value) else f"{value:.3g}"


def chance(value: float) -> str:
    """A probability: a percentage while that can be read, else a power of ten."""
    if value == 0:
        return "0"
    return percent(value) if value >= 0.001 else f"10{_raised(round(log10(value)))}"


def megabytes(value: int) -> str:
    for unit, length in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= length:
            return f"{value / length:.3g}\u00a0{unit}"
    return f"{value}\u00a0B"


def _raised(value: int) -> str:
    return str(value).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _linked(name: str) -> str:
    """The address of a static file: it changes with the file."""
    return f"/static/{name}?{sha256(STATIC[name]).hexdigest()[:16]}"


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("api"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = (short, grouped, seconds, ago, ahead, stamp, iso, percent, ratio, chance, megabytes)
    made.filters |= {one.__name__: one for one in shown}
    made.globals |= {"static": _linked, "STAGES": STAGES, "REASONS": REASONS, "HOWS": HOWS}
    return made


_templates = _environment()
