"""Content-addressed files: the address is the plain BLAKE3 digest of the bytes, as `b3sum` prints it.

A file is written under another name, synced, and renamed into place: an address leads to whole bytes or to nothing.
Directories are 0700 and files 0600.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from proof.errors import Malformed, Unavailable

ADDRESS = re.compile("[0-9a-f]{64}")


class TooLarge(Malformed):
    """More bytes than the limit; nothing of them is kept."""


class Upload:
    """Bytes on their way in; kept by `Blobs.place` or gone."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.size = path, 0
        self._limit, self._hash = limit, blake3()
        self._file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")

    def write(self, chunk: bytes) -> None:
        """Raises TooLarge before writing past the limit, Unavailable when the disk does not take it."""
        self.size += len(chunk)
        if self.size > self._limit:
            raise TooLarge(f"more than {self._limit} bytes")
        self._hash.update(chunk)
        try:
            self._file.write(chunk)
        except OSError as error:
            raise Unavailable(f"cannot store the upload: {error.strerror}") from error

    def close(self) -> str:
        """The address of what was written, on the disk for good."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise Unavailable(f"cannot store the upload: {error.strerror}") from error
        finally:
            self._file.close()
        return self._hash.hexdigest()


class Blobs:
    def __init__(self, root: Path) -> None:
        self.root, self._partial = root, root / "partial"
        self._partial.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def upload(self, limit: int) -> Iterator[Upload]:
        upload = Upload(self.scratch(), limit)
        try:
            yield upload
        finally:
            upload._file.close()
            upload.path.unlink(missing_ok=True)

    def scratch(self) -> Path:
        """A fresh name for a file that its maker removes or hands to `adopt`."""
        return self._partial / secrets.token_hex(16)

    def place(self, upload: Upload, address: str) -> str:
        """Keep a closed upload under its address."""
        return self._place(upload.path, address)

    def adopt(self, path: Path) -> str:
        """Take over a finished file under `scratch`."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fchmod(descriptor, 0o600)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return self._place(path, _address(path))

    def path(self, address: str) -> Path:
        """Raises Unavailable when it is not there."""
        found = self._path(address)
        if not found.is_file():
            raise Unavailable(f"blob {address} is missing")
        return found

    def find(self, address: str) -> Path | None:
        """The path of an address as somebody wrote it; None for what is no address or not here."""
        found = self._path(address) if ADDRESS.fullmatch(address) else None
        return found if found and found.is_file() else None

    def check(self, address: str) -> Path:
        """The path, once its bytes are those of the address: a rotten disk must not speak against a worker."""
        found = self.path(address)
        if _address(found) != address:
            raise Unavailable(f"blob {address} is damaged")
        return found

    def drop(self, address: str) -> None:
        self._path(address).unlink(missing_ok=True)

    def clear(self, before: float) -> None:
        """Remove partial files last touched before then: their writers are gone."""
        for path in self._partial.iterdir():
            if path.stat().st_mtime < before:
                path.unlink(missing_ok=True)

    def _path(self, address: str) -> Path:
        return self.root / address[:2] / address

    def _place(self, source: Path, address: str) -> str:
        target = self._path(address)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        source.replace(target)
        for folder in (target.parent, self.root):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return address


def _address(path: Path) -> str:
    return blake3().update_mmap(path).hexdigest()
