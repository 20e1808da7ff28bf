"""The file of a secret key: the graph without the weights that the key stands for, and the key itself, mode 0600.

A safetensors container. Its seed gives r and the secret columns; when that is revealed the model gives the rest again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from gpu.kernels.widen import NARROW
from gpu.keys import CHALLENGES, COLUMNS, Key, Matrix, Role, Table, blocks, roles, secret
from gpu.plan import Model
from proof import bundle
from proof.digest import DIGEST_BYTES, Tag, digest_json, tagged
from proof.encoding import decimal, fields, octets, text
from proof.errors import Malformed
from proof.graph import Array, graph_of, load
from proof.sampling import SEED_BYTES

MAX_CHECKS = 10_000  # verdicts of one key (S7): each is one interaction of the theorem, however many rows it covers
MAX_CLEAR_BYTES = 2**28  # of the weights that no product uses: a key file carries them
KEY, REVEAL = "key/1", "reveal/1"
HOLLOW = "weight"  # marks, in the graph of a key, an input that is a weight without values


@dataclass(frozen=True)
class Terms:
    """Of a key: the epoch it is for, which ends at `until` (Unix seconds), and the verdicts it may give. A public key
    was rebuilt after its seed had been revealed: it repeats verdicts, and says nothing about later proofs."""

    epoch: str
    until: int
    checks: int = MAX_CHECKS
    public: bool = False


@dataclass(frozen=True)
class Held:
    key: Key
    terms: Terms


@dataclass(frozen=True)
class Revealed:
    """The seed of the key `id`, and what it was for."""

    seed: bytes
    id: bytes
    model: bytes
    terms: Terms


def write(path: Path, key: Key, terms: Terms) -> None:
    """Raises Malformed when more would lie in the file than a key should carry."""
    tensors, metadata = _tensors(key), _metadata(KEY, key, terms)
    digest = _digest(metadata, tensors).hex()
    bundle.write(path, tensors.items(), metadata | {"digest": digest}, mode=0o600)


def read(path: Path) -> Held:
    """Raises Malformed for anything but a whole key file."""
    container = bundle.read(path)
    metadata, tensors = dict(container.metadata), container.tensors
    digest = metadata.pop("digest", None)
    id_, model_id, terms = _stated(metadata, KEY, path)
    if digest != _digest(metadata, tensors).hex():
        raise Malformed(f"{path} is damaged: its digest is not that of its content")
    graph, numbers = _taken(tensors, "graph", np.uint8), _taken(tensors, "nodes", np.int64)
    key = _key(_model(graph, numbers, model_id), _taken(tensors, "seed", np.uint8), tensors)
    if key.id != id_:
        raise Malformed(f"{path}: the key's id is not that of its seed and model")
    return Held(key, terms)


def write_revealed(path: Path, held: Held) -> None:
    seed = np.frombuffer(held.key.seed, np.uint8)
    bundle.write(path, [("seed", seed)], _metadata(REVEAL, held.key, held.terms))


def read_revealed(path: Path) -> Revealed:
    container = bundle.read(path)
    id_, model_id, terms = _stated(container.metadata, REVEAL, path)
    seed = _taken(container.tensors, "seed", np.uint8).tobytes()
    if len(seed) != SEED_BYTES or tagged(Tag.KEY, seed + model_id) != id_:
        raise Malformed(f"{path}: the seed is not that of key {id_.hex()}")
    return Revealed(seed, id_, model_id, terms)


def _stated(metadata: Mapping[str, str], form: str, path: Path) -> tuple[bytes, bytes, Terms]:
    """Ids of key and model, and terms."""
    if metadata.get("assay") != form:
        raise Malformed(f"{path}: not a {'key' if form == KEY else 'revealed key'}, as metadata.assay is not {form}")
    names = ("checks", "epoch", "key", "model", "public", "until", "assay")
    checks, epoch, id_, model_id, public, until, _ = fields(dict(metadata), "metadata", names)
    if public not in ("true", "false"):
        raise Malformed("metadata.public: neither true nor false")
    terms = Terms(text(epoch, "epoch"), _number(until, "until"), _number(checks, "checks"), public == "true")
    return octets(id_, "key", DIGEST_BYTES), octets(model_id, "model", DIGEST_BYTES), terms


def _metadata(form: str, key: Key, terms: Terms) -> dict[str, str]:
    return {
        "assay": form,
        "checks": str(terms.checks),
        "epoch": terms.epoch,
        "key": key.id.hex(),
        "model": key.model.id.hex(),
        "public": json.dumps(terms.public),
        "until": str(terms.until),
    }


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> bytes:
    def described(array: Array) -> list[Any]:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return [str(array.dtype), list(array.shape), tagged(Tag.KEY, data).hex()]

    return digest_json(Tag.KEY, [dict(metadata), {name: described(array) for name, array in tensors.items()}])


def _tensors(key: Key) -> dict[str, Array]:
    numbers = np.array([node.index for node in key.model.nodes], np.int64)
    tensors = {"graph": _hollow(key), "nodes": numbers, "seed": np.frombuffer(key.seed, np.uint8)}
    for number, part in enumerate(key.parts.values()):
        if isinstance(part, Table):
            tensors[f"{number}/sums"] = part.sums
            continue
        exponents = (np.frexp(part.d)[1] - 1).astype(np.int16)
        members = {"u": part.u, "nu": part.nu, "d": exponents, "at": part.at, "columns": part.columns}
        tensors |= {f"{number}/{name}": array for name, array in members.items()}
    return tensors


def _hollow(key: Key) -> Array:
    """The graph as ONNX: weights that the key stands for are inputs of it, the others lie inside."""
    model, stands = key.model, {role.weight for role in key.roles.values()}
    clear = {name: value for name, value in model.constants.items() if name not in stands}
    size = sum(value.nbytes for value in clear.values())
    if size > MAX_CLEAR_BYTES:
        largest = max(clear, key=lambda name: clear[name].nbytes)
        raise Malformed(f"a key file would carry {size} bytes of weights such as {largest!r}: verify with the model")
    given = [(i.name, i.dtype, i.shape, "") for i in model.graph.inputs]
    given += [(name, model.constants[name].dtype, model.constants[name].shape, HOLLOW) for name in sorted(stands)]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape, doc)
        for name, dtype, shape, doc in given
    ]
    # Of an output only the name is read; ONNX wants the rest.
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in model.graph.outputs]
    proto = helper.make_model(
        helper.make_graph(
            [node.proto for node in model.nodes],
            "key",
            inputs,
            outputs,
            [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in clear.items()],
        ),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in model.graph.opsets.items()],
    )
    return np.frombuffer(proto.SerializeToString(deterministic=True), np.uint8)


def _model(graph: Array, numbers: Array, id_: bytes) -> Model:
    """The model of a key: weights that it stands for have a dtype and a shape, and zeros that nothing reads.

    Nodes keep their numbers, which name what is drawn for them, though those that were folded are left out.
    """
    proto = load(graph.tobytes())
    hollow = {value.name for value in proto.graph.input if value.doc_string == HOLLOW}
    read = graph_of(proto)
    weights = dict(read.weights)
    for given in read.inputs:
        if given.name in hollow:
            weights[given.name] = np.broadcast_to(np.zeros((), given.dtype), tuple(map(_size, given.shape)))
    inputs = tuple(given for given in read.inputs if given.name not in hollow)
    if len(numbers) != len(read.nodes):
        raise Malformed(f"nodes: {len(numbers)} numbers for {len(read.nodes)} nodes")
    nodes = tuple(replace(node, index=number) for node, number in zip(read.nodes, numbers.tolist(), strict=True))
    model = Model.of(replace(read, id=id_, nodes=nodes, weights=weights, inputs=inputs))
    if {role.weight for role in roles(model).values()} != hollow:
        raise Malformed("graph: a weight without values is used otherwise than a key can check")
    return model


def _key(model: Model, seed: Array, tensors: Mapping[str, Array]) -> Key:
    wanted = roles(model)
    if len(seed) != SEED_BYTES:
        raise Malformed(f"seed: not {SEED_BYTES} bytes")
    found: dict[Role, Matrix | Table] = {}
    names = {"graph", "nodes", "seed"}
    for number, role in enumerate(dict.fromkeys(wanted.values())):
        members = {}
        for name, (dtype, shape) in _forms(model, role).items():
            names.add(f"{number}/{name}")
            members[name] = array = _taken(tensors, f"{number}/{name}", dtype)
            if array.shape != shape:
                raise Malformed(f"{number}/{name}: of shape {array.shape}, not {shape}")
        if not role.table:
            members["d"] = np.ldexp(1.0, members["d"].astype(np.int32))
        found[role] = Table(**members) if role.table else Matrix(**members)
    if tensors.keys() != names:
        raise Malformed(f"{min(tensors.keys() - names)}: no part of a key")
    return Key(model, seed.tobytes(), wanted, secret(model, wanted, seed.tobytes()), found)


def _forms(model: Model, role: Role) -> dict[str, tuple[Any, tuple[int, ...]]]:
    weight = model.constants[role.weight]
    k, n = weight.shape[::-1] if role.transposed else weight.shape
    if role.table:
        return {"sums": (np.float64, (k, CHALLENGES))}
    count, kept = len(blocks(role, n)), np.float32 if weight.dtype in NARROW else np.float64
    return {
        "u": (kept, (count, CHALLENGES, k)),
        "nu": (kept, (count, k)),
        "d": (np.int16, (n,)),
        "at": (np.int64, (COLUMNS,)),
        "columns": (weight.dtype, (COLUMNS, k)),
    }


def _taken(tensors: Mapping[str, Array], name: str, dtype: Any) -> Array:
    if name not in tensors or tensors[name].dtype != dtype:
        raise Malformed(f"{name}: missing or not of {np.dtype(dtype)}")
    return tensors[name]


def _size(dim: int | str | None) -> int:
    if not isinstance(dim, int):
        raise Malformed(f"graph: a weight of size {dim}")
    return dim


def _number(value: object, at: str) -> int:
    if not isinstance(value, str):
        raise Malformed(f"{at}: not a decimal string")
    return decimal(value, at, 63)
