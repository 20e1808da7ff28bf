"""Tensors of a Hugging Face folder by name: where the bytes of each lie. Headers are read, weights are not.

The files are safetensors: one, or shards that an index names.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx

from proof import encoding
from proof.bundle import MAX_HEADER_BYTES
from proof.errors import Malformed
from proof.graph import DTYPES, Array, Spec

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 * 2**20

_SIZE_BYTES = 8


@dataclass(frozen=True)
class Stored:
    path: Path
    offset: int  # in the file
    spec: Spec

    def read(self) -> Array:
        count = self.spec.size
        return np.fromfile(self.path, self.spec.dtype, count, offset=self.offset).reshape(self.spec.shape)

    def initializer(self, name: str) -> onnx.TensorProto:
        """A tensor of a graph whose bytes are these, in a file beside the graph's own."""
        kind = onnx.helper.np_dtype_to_tensor_dtype(self.spec.dtype)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=self.spec.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": self.path.name, "offset": self.offset, "length": self.spec.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder. Raises Malformed naming the file that is missing or wrong."""
    index = folder / INDEX
    if (folder / WHOLE).is_file() or not index.is_file():  # of both Transformers takes the one file
        return _file(folder, WHOLE)
    found = encoding.parse(index.read_bytes(), INDEX, MAX_INDEX_BYTES)
    shards = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise Malformed(f"{INDEX}: no weight_map from tensors to files")
    files = {shard: _file(folder, shard) for shard in sorted(set(shards.values()))}
    for name, shard in shards.items():
        if name not in files[shard]:
            raise Malformed(f"{INDEX}: {name} is not in {shard}")
    return {name: files[shard][name] for name, shard in shards.items()}


def _file(folder: Path, name: str) -> dict[str, Stored]:
    path = folder / name
    if path.name != name:
        raise Malformed(f"{INDEX}: {name} is not a file of the same folder")
    if not path.is_file():
        raise Malformed(f"{folder} has no {name}: weights are read from safetensors")
    if path.resolve() != folder.resolve() / name:
        raise Malformed(f"{name} is a link out of its folder: download the files themselves, `hf download --local-dir`")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_SIZE_BYTES), "little")
        if length > min(MAX_HEADER_BYTES, size - _SIZE_BYTES):
            raise Malformed(f"{name}: a header of {length} bytes")
        header = encoding.parse(file.read(length), name, MAX_HEADER_BYTES)
    if not isinstance(header, dict):
        raise Malformed(f"{name}: its header is not an object")
    start = _SIZE_BYTES + length
    return {
        tensor: _entry(path, start, size - start, f"{name}: {tensor}", entry)
        for tensor, entry in header.items()
        if tensor != "__metadata__"
    }


def _entry(path: Path, start: int, size: int, at: str, entry: object) -> Stored:
    dtype, axes, offsets = encoding.fields(entry, at, ("dtype", "shape", "data_offsets"))
    if dtype not in tuple(DTYPES):
        raise Malformed(f"{at} is of the type {dtype}, not one of {', '.join(DTYPES)}")
    shape, element = encoding.shape(axes, f"{at}.shape"), DTYPES[str(dtype)]
    span = [encoding.integer(offset, f"{at}.data_offsets", size) for offset in encoding.array(offsets, at, 2)]
    if len(span) != 2 or span[1] - span[0] != prod(shape) * element.itemsize:
        raise Malformed(f"{at} has other bytes than its type and shape take")
    return Stored(path, start + span[0], Spec(element, shape))
