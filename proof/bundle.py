"""Tensors in a file: the safetensors container, and in it a proof, or a proof with its verdict (a bundle).

Layout: 8 bytes little-endian header size, the header as JSON padded with spaces, the tensors without gaps.
A file is memory-mapped: reading costs its header, and the arrays are views that hold the mapping open.
"""

import mmap
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from proof import encoding
from proof.digest import DIGEST_BYTES, Tag, canonical, tagged_file
from proof.errors import Malformed
from proof.graph import DTYPES, MAX_NAME_BYTES, Array, dtype_name
from proof.messages import (
    MAX_MESSAGE_BYTES,
    MAX_TENSORS,
    Challenge,
    Commitment,
    Json,
    Task,
    Verdict,
)

MAX_HEADER_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2**40
MAX_KEY_BYTES = MAX_NAME_BYTES + len("siblings/")
MAX_HELD_TENSORS = 2 * MAX_TENSORS  # a proof holds two for each that is committed
FORMAT = "proof/1"

_SIZE_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Container:
    metadata: dict[str, str]
    tensors: dict[str, Array]  # read-only views


@dataclass(frozen=True)
class Opening:
    """The opened rows of one tensor, in order, and the siblings that lead from them to its root."""

    rows: Array  # (rows, width)
    siblings: Array  # (siblings, 32) uint8


@dataclass(frozen=True)
class Proof:
    """The openings that answer one challenge to one commitment."""

    task: Task | None
    commitment: Commitment
    challenge: Challenge
    openings: Mapping[str, Opening]  # by the name of the tensor


@dataclass(frozen=True)
class Bundle:
    """Enough to check again offline. The attestation is JSON here; attestation.py decodes it."""

    proof: Proof
    verdict: Verdict
    attestation: Json | None


def write(path: Path, tensors: Iterable[tuple[str, Array]], metadata: Mapping[str, str], *, mode: int = 0o666) -> None:
    """Write the tensors under `path`, which appears whole or not at all. None of them is copied whole.

    They lie by size of element, largest first, then by name: each is aligned, and the bytes follow from the content.
    """
    arrays = dict(named := list(tensors))
    if len(arrays) != len(named) or _METADATA in arrays:
        raise Malformed(f"tensors of one name, or of the name {_METADATA}")
    ordered = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header = _header(arrays, ordered, metadata)
    partial = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(len(header).to_bytes(_SIZE_BYTES, "little") + header)
            for name in ordered:
                file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, *, limit: int = MAX_FILE_BYTES) -> Container:
    """Map a file of at most `limit` bytes. Raises Malformed for anything but one well-formed container."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not _SIZE_BYTES <= size <= limit:
            raise Malformed(f"a file of {size} bytes, not of {_SIZE_BYTES} to {limit}")
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    header_size = int.from_bytes(mapped[:_SIZE_BYTES].tobytes(), "little")
    if header_size > min(MAX_HEADER_BYTES, size - _SIZE_BYTES):
        raise Malformed(f"a header of {header_size} bytes")
    text, data = np.split(mapped[_SIZE_BYTES:], [header_size])
    header = encoding.parse(text.tobytes(), "header", MAX_HEADER_BYTES)
    if not isinstance(header, dict) or text[0] != ord("{"):
        raise Malformed("header: not an object")
    metadata = _metadata(header.pop(_METADATA, {}))
    return Container(metadata, _tensors(header, data))


def write_proof(path: Path, proof: Proof) -> None:
    metadata = {
        "assay": FORMAT,
        "commitment": _json(proof.commitment.to_json()),
        "challenge": _json(proof.challenge.to_json()),
    }
    if proof.task is not None:
        metadata["task"] = _json(proof.task.to_json())
    openings = proof.openings.items()
    rows = [(f"rows/{name}", opening.rows) for name, opening in openings]
    siblings = [(f"siblings/{name}", opening.siblings) for name, opening in openings]
    write(path, rows + siblings, metadata)


def read_proof(path: Path, *, limit: int = MAX_FILE_BYTES) -> Proof:
    """Read a proof, also out of a bundle. Whether it is true is for the verifier to say."""
    return _proof(read(path, limit=limit))


def write_bundle(source: Path, path: Path, verdict: Verdict, attestation: Json | None) -> None:
    """Write the proof file `source` again, with its verdict and the attestation's JSON."""
    container = read(source)
    metadata = container.metadata | {"verdict": _json(verdict.to_json())}
    if attestation is not None:
        metadata["attestation"] = _json(attestation)
    write(path, container.tensors.items(), metadata)


def read_bundle(path: Path, *, limit: int = MAX_FILE_BYTES) -> Bundle:
    container = read(path, limit=limit)
    proof = _proof(container)
    if "verdict" not in container.metadata:
        raise Malformed("metadata.verdict: missing")
    verdict = Verdict.from_json(_parsed(container.metadata, "verdict"))
    attestation = _parsed(container.metadata, "attestation")
    if attestation is not None and not isinstance(attestation, dict):
        raise Malformed("attestation: not an object")
    return Bundle(proof, verdict, attestation)


def file_digest(path: Path) -> bytes:
    """The digest of a proof or bundle file's bytes: what an upload is signed for."""
    return tagged_file(Tag.PROOF, path)


def _header(arrays: Mapping[str, Array], ordered: list[str], metadata: Mapping[str, str]) -> bytes:
    ends = np.cumsum([arrays[name].nbytes for name in ordered], dtype=np.int64).tolist()
    spans = dict(zip(ordered, zip([0, *ends], ends, strict=False), strict=True))
    entries = {
        _key(name): {
            "dtype": dtype_name(array.dtype),
            "shape": list(array.shape),
            "data_offsets": list(spans[name]),
        }
        for name, array in arrays.items()
    }
    header = canonical({_METADATA: dict(metadata)} | entries)
    header += b" " * (-len(header) % _SIZE_BYTES)
    if len(header) > MAX_HEADER_BYTES or len(entries) > MAX_HELD_TENSORS:
        raise Malformed(f"{len(entries)} tensors and a header of {len(header)} bytes are too many")
    return header


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Malformed(f"{_METADATA}: not an object")
    for key, member in value.items():
        encoding.text(key, _METADATA)
        encoding.text(member, f"{_METADATA}.{key}", MAX_HEADER_BYTES)
    return value


def _tensors(header: Mapping[str, object], data: Array) -> dict[str, Array]:
    if len(header) > MAX_HELD_TENSORS:
        raise Malformed(f"{len(header)} tensors are more than {MAX_HELD_TENSORS}")
    tensors, spans = {}, []
    for name, value in header.items():
        _key(name)
        dtype, axes, offsets = encoding.fields(value, name, ("dtype", "shape", "data_offsets"))
        if dtype not in tuple(DTYPES):
            raise Malformed(f"{name}.dtype: not one of {', '.join(DTYPES)}")
        shape, element = encoding.shape(axes, f"{name}.shape"), DTYPES[str(dtype)]
        begin, end = _span(offsets, f"{name}.data_offsets", len(data))
        if end - begin != prod(shape) * element.itemsize:
            raise Malformed(f"{name}.data_offsets: {end - begin} bytes for {dtype} {shape}")
        spans.append((begin, end))
        tensors[name] = data[begin:end].view(element).reshape(shape)
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise Malformed(f"tensors overlap or leave a gap at byte {at}")
        at = end
    if at != len(data):
        raise Malformed(f"{len(data) - at} bytes belong to no tensor")
    return tensors


def _key(name: str) -> str:
    if not encoding.text(name, "tensor name", MAX_KEY_BYTES):
        raise Malformed("tensor name: empty")
    return name


def _span(value: object, at: str, size: int) -> tuple[int, int]:
    offsets = [encoding.integer(offset, at, size) for offset in encoding.array(value, at, 2)]
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Malformed(f"{at}: not a begin and an end")
    return offsets[0], offsets[1]


def _proof(container: Container) -> Proof:
    metadata, tensors = container.metadata, container.tensors
    if metadata.get("assay") != FORMAT:
        raise Malformed(f"metadata.assay: not {FORMAT}")
    known = {"assay", "task", "commitment", "challenge", "verdict", "attestation"}
    if unknown := metadata.keys() - known:
        raise Malformed(f"metadata.{min(unknown)}: not a field")
    task = _parsed(metadata, "task")
    names = [key.removeprefix("rows/") for key in tensors if key.startswith("rows/")]
    if tensors.keys() != {f"{part}/{name}" for name in names for part in ("rows", "siblings")}:
        raise Malformed("a tensor without its rows or its siblings, or of another name")
    return Proof(
        task=None if task is None else Task.from_json(task),
        commitment=Commitment.from_json(_parsed(metadata, "commitment")),
        challenge=Challenge.from_json(_parsed(metadata, "challenge")),
        openings={name: _opening(name, tensors[f"rows/{name}"], tensors[f"siblings/{name}"]) for name in names},
    )


def _opening(name: str, rows: Array, siblings: Array) -> Opening:
    if rows.ndim != 2:
        raise Malformed(f"rows/{name}: of rank {rows.ndim}, not 2")
    if siblings.dtype != np.uint8 or siblings.shape[1:] != (DIGEST_BYTES,):
        raise Malformed(f"siblings/{name}: not digests")
    if rows.dtype == np.bool_ and rows.view(np.uint8).max(initial=0) > 1:
        raise Malformed(f"rows/{name}: a truth value that is neither 0 nor 1")
    return Opening(rows, siblings)


def _json(value: Json) -> str:
    return canonical(value).decode()


def _parsed(metadata: Mapping[str, str], key: str) -> object:
    """The JSON under a key of the metadata; None, which no message is, where there is no such key."""
    if key not in metadata:
        return None
    return encoding.parse(metadata[key], key, MAX_MESSAGE_BYTES)
