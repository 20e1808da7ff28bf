"""A signer on another machine, which holds the key: Web3Signer's eth1 API, or anything that speaks it.

It is sent the EIP-712 preimage (0x1901, domain separator, struct hash), hashes it with Keccak-256 and signs. What comes
back is believed only if it recovers to the address that was configured. It knows the key by its public key.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from time import monotonic
from typing import Any

import httpx

from proof import eip712
from proof.errors import Malformed, Rejected, Unavailable
from verifier.keystore import read_private

TIMEOUT = 10.0  # seconds of silence, and of the whole answer
MAX_SIGNATURE_BYTES = 4096  # of the answer that holds it
MAX_KEYS_BYTES = 2**20  # of the list of public keys
API = "/api/v1/eth1"

_SIGNATURE = re.compile(r'\s*"?0x([0-9a-fA-F]{130})"?\s*')
_PUBLIC_KEY = re.compile(r'"(0x([0-9a-fA-F]{128}))"')


@dataclass(frozen=True)
class RemoteSigner:
    """Signs as `address`. Raises Unavailable when the signer does not answer, or not with its signature."""

    url: str
    address: str
    token: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"0x[0-9a-f]{40}", self.address):
            raise Malformed("ASSAY_SIGNER_ADDRESS: not 0x and 40 hex digits; the remote signer signs as it")
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            raise Malformed("ASSAY_SIGNER_URL: not a URL") from None
        near = url.scheme == "http" and _is_loopback(url.host)
        if not (near or (url.scheme == "https" and url.host) or (url.scheme == "unix" and not url.host)):
            raise Malformed("ASSAY_SIGNER_URL: https, http to this machine, or unix:/path/of/a/socket")
        if url.userinfo or url.query or url.fragment:
            raise Malformed("ASSAY_SIGNER_URL: no password, query or fragment; ASSAY_SIGNER_TOKEN_FILE holds a token")
        if self.token is not None:
            _bearer(self.token)

    def sign(self, preimage: bytes) -> bytes:
        """The signature of keccak256(preimage), r, s and v."""
        path = f"{API}/sign/{self._key}"
        answer = self._ask("POST", path, MAX_SIGNATURE_BYTES, {"data": "0x" + preimage.hex()})
        found = _SIGNATURE.fullmatch(answer)
        if found is None:
            raise Unavailable("the remote signer answers without a signature")
        signature = bytes.fromhex(found[1])
        try:
            signer = eip712.recover(eip712.keccak(preimage), signature)
        except Rejected as rejection:
            raise Unavailable(f"the remote signer's signature is none: {rejection.detail}") from rejection
        if signer != self.address:
            raise Unavailable(f"the remote signer signs as {signer}, not as {self.address}")
        return signature

    @cached_property
    def _key(self) -> str:
        """The public key of the address, as the signer spells it."""
        for spelled, digits in _PUBLIC_KEY.findall(self._ask("GET", f"{API}/publicKeys", MAX_KEYS_BYTES)):
            if eip712.keccak(bytes.fromhex(digits))[12:].hex() == self.address.removeprefix("0x"):
                return str(spelled)
        raise Unavailable(f"the remote signer has no key of {self.address}")

    @cached_property
    def _http(self) -> httpx.Client:
        url = httpx.URL(self.url)
        socket = url.path if url.scheme == "unix" else None
        # the transport alone reads the environment: SSL_CERT_FILE names a private authority, and no proxy is taken
        transport = httpx.HTTPTransport(uds=socket, trust_env=True)
        base = "http://localhost" if socket else self.url
        return httpx.Client(transport=transport, base_url=base, timeout=TIMEOUT, trust_env=False)

    def _ask(self, method: str, path: str, limit: int, body: Any = None) -> str:
        headers = {"Accept-Encoding": "identity"}  # an answer is as long as it says
        until, content = monotonic() + TIMEOUT, b""
        try:
            if self.token is not None:
                headers["Authorization"] = _bearer(self.token)
            with self._http.stream(method, path, json=body, headers=headers) as answer:
                for part in answer.iter_raw():
                    content += part
                    if len(content) > limit or monotonic() > until:
                        raise Unavailable("the remote signer does not come to an end")
        except (httpx.HTTPError, Malformed) as error:
            raise Unavailable(f"the remote signer cannot be asked: {type(error).__name__}") from error
        if answer.status_code != httpx.codes.OK:
            raise Unavailable(f"the remote signer answers {answer.status_code}")
        return content.decode("latin-1")


def _bearer(path: Path) -> str:
    """The header's value. Raises Malformed, which does not show the token."""
    token = read_private(path).strip()
    if not re.fullmatch(rb"[\x21-\x7e]+", token):
        raise Malformed(f"{path}: not a token of printable ASCII")
    return f"Bearer {token.decode()}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
