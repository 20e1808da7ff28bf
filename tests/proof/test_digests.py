"""Digests: published vectors of RFC 8785, and tags that keep domains apart."""

from pathlib import Path

import pytest
from blake3 import blake3

from proof import encoding
from proof.digest import KEYS, Tag, canonical, digest_json, tagged, tagged_file

JCS = Path(__file__).parents[3] / "shared/vectors/jcs"
NAMES = [path.stem for path in sorted(JCS.glob("input/*.json"))] if JCS.is_dir() else []


@pytest.mark.skipif(not NAMES, reason=f"published vectors are not at {JCS}")
@pytest.mark.parametrize("name", NAMES or [None])
def test_canonical_json_is_the_published_one(name):
    value = encoding.parse((JCS / f"input/{name}.json").read_bytes(), name, 2**20)
    expected = bytes.fromhex("".join((JCS / f"outhex/{name}.txt").read_text().split()))
    assert canonical(value) == expected


@pytest.mark.parametrize("value", [2**53, -(2**53), float("nan"), float("inf"), "\ud800", b"bytes"])
def test_what_json_cannot_carry_is_no_canonical_json(value):
    with pytest.raises(ValueError):  # noqa: PT011
        canonical({"value": value})


def test_the_same_bytes_differ_under_every_tag():
    assert len({tagged(tag, b"") for tag in Tag}) == len(Tag)


def test_a_digest_is_keyed_blake3():
    key = blake3(b"", derive_key_context="assay v1 task").digest()
    assert KEYS[Tag.TASK] == key
    assert digest_json(Tag.TASK, {"b": 1, "a": []}) == blake3(b'{"a":[],"b":1}', key=key).digest()


def test_a_file_has_the_digest_of_its_bytes(tmp_path):
    path = tmp_path / "proof"
    path.write_bytes(b"bytes" * 1000)
    assert tagged_file(Tag.PROOF, path) == tagged(Tag.PROOF, b"bytes" * 1000)
