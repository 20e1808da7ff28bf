"""Files by content: whole or absent, bounded, and not believed when they have changed."""

import os
import stat

import pytest
from blake3 import blake3

from proof.errors import Unavailable
from verifier.blobs import Blobs, TooLarge


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path / "blobs")


def test_a_file_is_found_under_the_digest_of_its_bytes(blobs):
    with blobs.upload(10) as upload:
        upload.write(b"hello")
        upload.write(b"world")
        address = blobs.place(upload, upload.close())
    assert address == blake3(b"helloworld").hexdigest()
    assert blobs.check(address).read_bytes() == b"helloworld"
    assert stat.S_IMODE(blobs.path(address).stat().st_mode) == 0o600


def test_a_byte_over_the_limit_leaves_nothing(blobs):
    with blobs.upload(10) as upload:
        upload.write(b"helloworld")
        with pytest.raises(TooLarge):
            upload.write(b"!")
    assert [path for path in blobs.root.rglob("*") if path.is_file()] == []


def test_an_upload_that_is_not_placed_leaves_nothing(blobs):
    with blobs.upload(10) as upload:
        upload.write(b"hello")
        upload.close()
    assert [path for path in blobs.root.rglob("*") if path.is_file()] == []


def test_damaged_bytes_are_our_fault_and_nobody_elses(blobs):
    path = blobs.scratch()
    path.write_bytes(b"proof")
    address = blobs.adopt(path)
    blobs.path(address).write_bytes(b"pr00f")
    with pytest.raises(Unavailable, match="damaged"):
        blobs.check(address)
    blobs.path(address).unlink()
    with pytest.raises(Unavailable, match="missing"):
        blobs.check(address)


def test_clearing_removes_only_what_was_left_behind(blobs):
    dead, alive = blobs.scratch(), blobs.scratch()
    for path in (dead, alive):
        path.write_bytes(b"part")
    old = dead.stat().st_mtime - 100
    os.utime(dead, (old, old))
    blobs.clear(old + 1)
    assert (dead.exists(), alive.exists()) == (False, True)
