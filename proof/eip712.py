"""EIP-712 for structs whose members are static, and secp256k1 signatures of its digests.

A digest is keccak256(0x1901 || domain separator || struct hash) in the domain {name "Assay", version "1", chainId,
verifyingContract}. A signature is 65 bytes r || s || v, v 27 or 28, and s low (EIP-2): one signer has one spelling.
libsecp256k1 does the curve. The tests hold every digest against eth_account, which takes a second to import.
"""

from collections.abc import Iterable
from typing import Any

from coincurve import PrivateKey, PublicKey
from Crypto.Hash import keccak as _keccak

from proof.errors import Reason, Rejected

DIGEST_BYTES = 32
KEY_BYTES = 32
SIGNATURE_BYTES = 65
DOMAIN = {"name": "Assay", "version": "1"}

_DOMAIN_TYPE = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


def keccak(data: bytes) -> bytes:
    return bytes(_keccak.new(digest_bits=256, data=data).digest())


def members(declaration: str) -> list[tuple[str, str]]:
    """(type, name) of each member of a declaration such as "Upload(bytes32 task,uint64 size)"."""
    listed = declaration[declaration.index("(") + 1 : -1].split(",")
    return [(kind, member) for kind, member in (entry.split(" ") for entry in listed)]


def word(kind: str, value: Any) -> bytes:
    """A member's value as its 32 bytes. Raises ValueError for a value that is not of the type."""
    if kind == "bytes32":
        if len(value) != DIGEST_BYTES:
            raise ValueError(f"{len(value)} bytes for a bytes32")
        return bytes(value)
    if kind == "address":
        return bytes.fromhex(value.removeprefix("0x")).rjust(DIGEST_BYTES, b"\0")
    if kind == "string":
        return keccak(value.encode())
    if not 0 <= value < 2 ** int(kind.removeprefix("uint")):
        raise ValueError(f"not a value of type {kind}")
    return int(value).to_bytes(DIGEST_BYTES, "big")


def struct_hash(declaration: str, values: Iterable[Any]) -> bytes:
    words = [word(kind, value) for (kind, _), value in zip(members(declaration), values, strict=True)]
    return keccak(keccak(declaration.encode()) + b"".join(words))


def digest(struct: bytes, chain_id: int, contract: str) -> bytes:
    """What is signed: a struct's hash in the domain of one chain and contract."""
    return keccak(preimage(struct, chain_id, contract))


def preimage(struct: bytes, chain_id: int, contract: str) -> bytes:
    """What is hashed to what is signed."""
    domain = struct_hash(_DOMAIN_TYPE, (DOMAIN["name"], DOMAIN["version"], chain_id, contract))
    return b"\x19\x01" + domain + struct


def address_of(private_key: bytes) -> str:
    """The lowercase address of a private key of 32 bytes. Raises ValueError for what is no key."""
    return _address(_key(private_key).public_key)


def sign(message: bytes, private_key: bytes) -> bytes:
    """The signature of a digest (RFC 6979 nonces)."""
    signature = bytes(_key(private_key).sign_recoverable(message, hasher=None))
    return signature[:64] + bytes([27 + signature[64]])


def recover(message: bytes, signature: bytes) -> str:
    """The address that signed the digest. Raises Rejected(SIGNATURE) for what is no signature."""
    if len(signature) != SIGNATURE_BYTES or signature[64] not in (27, 28):
        raise Rejected(Reason.SIGNATURE, "not r, s and v of 27 or 28")
    if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
        raise Rejected(Reason.SIGNATURE, "s is not low")
    compact = signature[:64] + bytes([signature[64] - 27])
    try:
        return _address(PublicKey.from_signature_and_message(compact, message, hasher=None))
    except ValueError:
        raise Rejected(Reason.SIGNATURE, "not a point of the curve") from None


def _key(private_key: bytes) -> PrivateKey:
    if len(private_key) != KEY_BYTES:
        raise ValueError(f"a private key has {KEY_BYTES} bytes")
    return PrivateKey(private_key)


def _address(key: PublicKey) -> str:
    return "0x" + keccak(key.format(compressed=False)[1:])[12:].hex()
