"""A private key encrypted under a password: Web3 Secret Storage version 3, as Ethereum's clients keep theirs.

scrypt (or PBKDF2 in the files of others) makes 32 bytes of the password: half of them encrypt (AES-128-CTR), half
authenticate (Keccak-256). The cost that a file asks for is bounded before any of it is paid.
"""

import hmac
import json
import os
import secrets
import stat
import uuid
from hashlib import pbkdf2_hmac
from pathlib import Path
from typing import Any

from Crypto.Cipher import AES
from Crypto.Protocol.KDF import scrypt
from Crypto.Util import Counter

from proof.attestation import key_address
from proof.eip712 import KEY_BYTES, keccak
from proof.encoding import fields, integer, octets, parse
from proof.errors import Malformed

SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**18, 8, 1  # of what we write: a second, and 256 MiB
MAX_SCRYPT_BYTES = 512 * 2**20
MAX_SCRYPT_P = 16
MAX_ITERATIONS = 10_000_000  # of PBKDF2
MAX_FILE_BYTES = 16_384
MAX_SALT = 64
PASSWORD_BYTES = 32  # of a password that we make up
DERIVED = 32


class Exists(Malformed):
    """A key is there already, and is never overwritten."""


def create(path: Path, password: bytes, key: bytes | None = None) -> str:
    """Write a key, a fresh one if none is given; returns its address. Raises Exists if the file does."""
    key = secrets.token_bytes(KEY_BYTES) if key is None else key
    content = json.dumps(encrypt(key, password), indent=1).encode()
    try:
        write_private(path, content)
    except FileExistsError:
        raise Exists(f"{path} exists: a key is never overwritten") from None
    return address(key)


def address(key: bytes) -> str:
    """Of a private key. Raises Malformed for 32 bytes that are none."""
    try:
        return key_address(key)
    except ValueError:
        raise Malformed("not a private key of secp256k1: it is 0, or not below the order") from None


def encrypt(key: bytes, password: bytes, n: int = SCRYPT_N) -> dict[str, Any]:
    owner, salt, iv = address(key), secrets.token_bytes(DERIVED), secrets.token_bytes(16)
    derived = _scrypt(password, salt, n, SCRYPT_R, SCRYPT_P)
    hidden = _cipher(derived, iv).encrypt(key)
    return {
        "version": 3,
        "id": str(uuid.UUID(bytes=secrets.token_bytes(16), version=4)),
        "address": owner.removeprefix("0x"),
        "crypto": {
            "cipher": "aes-128-ctr",
            "cipherparams": {"iv": iv.hex()},
            "ciphertext": hidden.hex(),
            "kdf": "scrypt",
            "kdfparams": {"dklen": DERIVED, "n": n, "r": SCRYPT_R, "p": SCRYPT_P, "salt": salt.hex()},
            "mac": keccak(derived[16:] + hidden).hex(),
        },
    }


def open_key(path: Path, password: bytes) -> bytes:
    """The private key. Raises Malformed for a wrong password or a file that is no keystore; neither is shown."""
    value = parse(read_private(path), str(path), MAX_FILE_BYTES)
    try:
        return decrypt(value, password)
    except Malformed as error:
        raise Malformed(f"{path}: {error}") from None


def decrypt(value: object, password: bytes) -> bytes:
    """The key in a keystore's parsed JSON."""
    if not isinstance(value, dict) or value.get("version") != 3:
        raise Malformed("not a keystore of version 3")
    names = ("cipher", "cipherparams", "ciphertext", "kdf", "kdfparams", "mac")
    cipher, params, hidden, kdf, cost, mac = fields(value.get("crypto", value.get("Crypto")), "crypto", names)
    if cipher != "aes-128-ctr":
        raise Malformed("crypto.cipher: not aes-128-ctr")
    (iv,) = fields(params, "crypto.cipherparams", ("iv",))
    secret = octets(hidden, "crypto.ciphertext", KEY_BYTES)
    derived = _derived(kdf, cost, password)
    if not hmac.compare_digest(keccak(derived[16:32] + secret), octets(mac, "crypto.mac", 32)):
        raise Malformed("the password is not the one of this keystore")
    return bytes(_cipher(derived, octets(iv, "crypto.cipherparams.iv", 16)).decrypt(secret))


def write_private(path: Path, content: bytes) -> None:
    """A new file of mode 0600, durable and whole or absent. Raises FileExistsError: the first of two wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_private(path: Path) -> bytes:
    """A file that only its owner can read, or as much of it as tells that it is too long. Raises Malformed."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_IMODE(mode) & 0o077:
                raise Malformed(f"{path}: others can read it; set its mode to 0600")
            return file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise Malformed(f"{path}: there is no such file; `assay init` makes the keys that are missing") from None
    except OSError as error:
        raise Malformed(f"{path}: cannot be read: {error.strerror}") from None


def _derived(kdf: object, cost: object, password: bytes) -> bytes:
    if kdf == "scrypt":
        length, n, r, p, salt = fields(cost, "crypto.kdfparams", ("dklen", "n", "r", "p", "salt"))
        n, r = integer(n, "crypto.kdfparams.n"), integer(r, "crypto.kdfparams.r")
        p = integer(p, "crypto.kdfparams.p", MAX_SCRYPT_P)
        if n < 2 or n & (n - 1) or r < 1 or p < 1 or _room(n, r, p) > MAX_SCRYPT_BYTES:
            raise Malformed(f"crypto.kdfparams: not a cost of scrypt within {MAX_SCRYPT_BYTES} bytes")
        _length(length)
        return _scrypt(password, _salt(salt), n, r, p)
    if kdf == "pbkdf2":
        length, count, prf, salt = fields(cost, "crypto.kdfparams", ("dklen", "c", "prf", "salt"))
        if prf != "hmac-sha256":
            raise Malformed("crypto.kdfparams.prf: not hmac-sha256")
        count = integer(count, "crypto.kdfparams.c", MAX_ITERATIONS)
        if count < 1:
            raise Malformed("crypto.kdfparams.c: not positive")
        _length(length)
        return pbkdf2_hmac("sha256", password, _salt(salt), count, DERIVED)
    raise Malformed("crypto.kdf: neither scrypt nor pbkdf2")


def _length(value: object) -> None:
    if integer(value, "crypto.kdfparams.dklen") != DERIVED:
        raise Malformed(f"crypto.kdfparams.dklen: not {DERIVED}")


def _salt(value: object) -> bytes:
    if not isinstance(value, str) or len(value) > 2 * MAX_SALT:
        raise Malformed(f"crypto.kdfparams.salt: not hex of at most {MAX_SALT} bytes")
    return octets(value, "crypto.kdfparams.salt", len(value) // 2)


def _scrypt(password: bytes, salt: bytes, n: int, r: int, p: int) -> bytes:
    """By pycryptodome: OpenSSL's refuses the cost of the published vector, n beyond 2^(16 r)."""
    return bytes(scrypt(password, salt, DERIVED, n, r, p))  # type: ignore[arg-type]  # its stubs know text only


def _room(n: int, r: int, p: int) -> int:
    """Bytes that scrypt works in."""
    return 128 * r * (n + p + 2) + 2**20


def _cipher(derived: bytes, iv: bytes) -> Any:
    return AES.new(derived[:16], AES.MODE_CTR, counter=Counter.new(128, initial_value=int.from_bytes(iv, "big")))
