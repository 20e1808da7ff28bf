"""Strict decoding of JSON: a value of the stated form, or Malformed that names the field.

Bytes are lowercase hex, Ethereum addresses lowercase with 0x, integers beyond 2^53 - 1 decimal strings.
"""

import json
import re
from collections.abc import Iterable
from math import prod

from proof.errors import Malformed
from proof.graph import MAX_NAME_BYTES, MAX_RANK

MAX_INTEGER = 2**53 - 1  # beyond it JSON numbers lose bits (RFC 8259 section 6)
MAX_ELEMENTS = 2**53 - 1  # of one tensor
MAX_TEXT_BYTES = 4096
MAX_DEPTH = 32  # the parser of the standard library recurses, up to a limit that any library may have raised

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,77}")
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_ADDRESS = re.compile(r"0x[0-9a-f]{40}")


def parse(data: bytes | str, at: str, limit: int) -> object:
    """JSON in UTF-8 of at most `limit` bytes (of text: characters), without repeated keys, NaN or infinity."""
    if len(data) > limit:
        raise Malformed(f"{at}: {len(data)} bytes are more than {limit}")
    try:
        decoded = data if isinstance(data, str) else data.decode()
        _shallow(decoded)
        return json.loads(decoded, object_pairs_hook=_unique, parse_constant=_refuse)
    except ValueError as error:
        raise Malformed(f"{at}: not JSON: {type(error).__name__}") from None


def fields(value: object, at: str, names: Iterable[str]) -> list[object]:
    """The members of an object that has exactly these names, in their order."""
    if not isinstance(value, dict):
        raise Malformed(f"{at}: not an object")
    names = list(names)
    for name in names:
        if name not in value:
            raise Malformed(f"{at}.{name}: missing")
    for name in value:
        if name not in names:
            raise Malformed(f"{at}.{str(name)[:MAX_NAME_BYTES]}: not a field")
    return [value[name] for name in names]


def array(value: object, at: str, limit: int) -> list[object]:
    if not isinstance(value, list):
        raise Malformed(f"{at}: not an array")
    if len(value) > limit:
        raise Malformed(f"{at}: {len(value)} items are more than {limit}")
    return value


def text(value: object, at: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Unicode text of at most `limit` bytes in UTF-8."""
    if not isinstance(value, str):
        raise Malformed(f"{at}: not a string")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise Malformed(f"{at}: not Unicode text") from None
    if size > limit:
        raise Malformed(f"{at}: {size} bytes are more than {limit}")
    return value


def name(value: object, at: str) -> str:
    if not text(value, at, MAX_NAME_BYTES):
        raise Malformed(f"{at}: empty")
    return str(value)


def integer(value: object, at: str, limit: int = MAX_INTEGER) -> int:
    """An integer in [0, limit]. `true` is not one, nor is 1.0."""
    if type(value) is not int:
        raise Malformed(f"{at}: not an integer")
    if not 0 <= value <= limit:
        raise Malformed(f"{at}: not in [0, {limit}]")
    return value


def decimal(value: object, at: str, bits: int) -> int:
    """A decimal string without sign or leading zeros, below 2^bits."""
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
        raise Malformed(f"{at}: not a decimal string")
    if int(value) >> bits:
        raise Malformed(f"{at}: not below 2^{bits}")
    return int(value)


def octets(value: object, at: str, size: int) -> bytes:
    """`size` bytes as lowercase hex."""
    if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
        raise Malformed(f"{at}: not {2 * size} lowercase hex digits")
    return bytes.fromhex(value)


def prefixed(value: object, at: str, size: int) -> bytes:
    """`size` bytes as 0x and lowercase hex: the form of EIP-712 tools."""
    if not isinstance(value, str) or not value.startswith("0x"):
        raise Malformed(f"{at}: not 0x and {2 * size} lowercase hex digits")
    return octets(value[2:], at, size)


def address(value: object, at: str) -> str:
    if not isinstance(value, str) or not _ADDRESS.fullmatch(value):
        raise Malformed(f"{at}: not 0x and 40 lowercase hex digits")
    return value


def shape(value: object, at: str) -> tuple[int, ...]:
    """Dimensions, any of them 0; the others multiply to at most MAX_ELEMENTS."""
    dimensions = array(value, at, MAX_RANK)
    axes = tuple(integer(axis, f"{at}[{i}]") for i, axis in enumerate(dimensions))
    if prod(max(axis, 1) for axis in axes) > MAX_ELEMENTS:
        raise Malformed(f"{at}: more than {MAX_ELEMENTS} elements")
    return axes


def _shallow(decoded: str) -> None:
    depth = 0
    for bracket in re.sub(r"[^][{}]+", "", _STRING.sub("", decoded)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} brackets open")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice")
    return members


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")
