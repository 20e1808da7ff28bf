"""Content-addressed files: the address is the plain BLAKE3 digest of the bytes, as `b3sum` prints it.

A file is written under another name, synced, and renamed into place: an address leads to whole bytes or to nothing.
Directories are 0700 and files 0600.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from proof.errors import Malformed, Unavailable

ADDRESS = re.compile("[0-9a-f]{64}")
ASIDE = ".aside"
PREFIX = 2  # characters of an address that name its folder


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
            self.abandon()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Let go of the file; a disk that does not take what is left was told of before."""
        with suppress(OSError):
            self._file.close()


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
            upload.abandon()
            upload.path.unlink(missing_ok=True)

    def scratch(self) -> Path:
        """A fresh name for a file that its maker removes or hands to `adopt`."""
        return self._partial / secrets.token_hex(16)

    @contextmanager
    def making(self) -> Iterator[Path]:
        """A fresh name for a file that is to be written; gone if that fails. A full disk is Unavailable."""
        path = self.scratch()
        try:
            with _storing():
                yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def place(self, upload: Upload, address: str) -> str:
        """Keep a closed upload under its address."""
        with _storing():
            return self._place(upload.path, address)

    def adopt(self, path: Path) -> str:
        """Take over a finished file under `scratch`, or `making`."""
        with _storing():
            return self._adopt(path)

    def _adopt(self, path: Path) -> str:
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

    def touch(self, address: str) -> bool:
        """Whether it is here; if so it counts as written now, so that it is not collected before it is pointed to."""
        try:
            os.utime(self._path(address))
        except FileNotFoundError:
            return False
        return True

    def check(self, address: str) -> Path:
        """The path, once its bytes are those of the address: a rotten disk must not speak against a worker."""
        found = self.path(address)
        if _address(found) != address:
            raise Unavailable(f"blob {address} is damaged")
        return found

    def older(self, before: float, at_once: int) -> Iterator[list[str]]:
        """Addresses of files last written before then, some at a time."""
        found: list[str] = []
        for folder in sorted(path for path in self.root.iterdir() if len(path.name) == PREFIX):
            for path in sorted(folder.iterdir()):
                if path.suffix == ASIDE and _written(path) < before:
                    _put_back(path, path.with_suffix(""))  # who set it aside has died
                elif ADDRESS.fullmatch(path.name) and _written(path) < before:
                    found.append(path.name)
                if len(found) == at_once:
                    yield found
                    found = []
        if found:
            yield found

    @contextmanager
    def aside(self, address: str, before: float) -> Iterator[Path | None]:
        """A file under another name, to be removed or else put back; None if it was written since, or is gone."""
        path = self._path(address)
        aside = path.with_suffix(ASIDE)
        try:
            path.replace(aside)
        except FileNotFoundError:
            yield None
            return
        try:
            yield aside if _written(aside) < before else None
        finally:
            _put_back(aside, path)

    def clear(self, before: float) -> None:
        """Remove partial files last touched before then: their writers are gone."""
        for path in self._partial.iterdir():
            if _written(path) < before:
                path.unlink(missing_ok=True)

    def _path(self, address: str) -> Path:
        return self.root / address[:PREFIX] / address

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


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"cannot store a file: {error.strerror}") from error


def _put_back(aside: Path, path: Path) -> None:
    with suppress(FileExistsError, FileNotFoundError):  # it was uploaded anew, or removed
        os.link(aside, path)
    aside.unlink(missing_ok=True)


def _written(path: Path) -> float:
    """Never, for a file that is gone: who looks for old ones is not to find it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _address(path: Path) -> str:
    return blake3().update_mmap(path).hexdigest()
