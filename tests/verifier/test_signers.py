"""What holds the attestation key: a keystore, a plain file, or a remote signer, which is believed in nothing."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from coincurve import PublicKey
from record import NOW, work

from proof import eip712
from proof.errors import Malformed, Unavailable
from verifier import keystore, release
from verifier.remote_signer import RemoteSigner
from verifier.settings import Settings

KEY, OTHER = bytes([7] * 32), bytes([8] * 32)
ADDRESS = eip712.address_of(KEY)
MESSAGE = b"\x19\x01" + bytes(64)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(keystore, "SCRYPT_N", 1024)
    return Settings.from_env({}, tmp_path)


def test_init_makes_a_key_that_is_encrypted_under_a_password_of_its_own(settings, caplog):
    release.create(settings)
    signer = release.signer_from(settings)
    release.create(settings)
    assert release.signer_from(settings).address == signer.address
    password = settings.default_password.read_text()
    assert len(password) == 64
    key = keystore.open_key(settings.default_key, password.encode())
    assert eip712.address_of(key) == signer.address
    assert eip712.recover(eip712.keccak(MESSAGE), signer.sign(MESSAGE)) == signer.address
    for path in (settings.default_key, settings.default_password):
        assert path.stat().st_mode & 0o777 == 0o600
    shown = repr(signer) + repr(settings) + caplog.text
    assert key.hex() not in shown
    assert str(key) not in shown
    assert password not in shown


def test_a_plain_key_file_is_taken_too(settings, tmp_path):
    path = tmp_path / "key"
    path.write_text(KEY.hex())
    path.chmod(0o600)
    assert release.signer_from(replace(settings, key=path)).address == ADDRESS
    path.chmod(0o644)
    with pytest.raises(Malformed, match="0600"):
        release.signer_from(replace(settings, key=path))


def test_a_key_without_its_password_is_no_key(settings):
    release.create(settings)
    settings.default_password.unlink()
    with pytest.raises(Malformed, match="password"):
        release.signer_from(settings)


@contextmanager
def signing(answer, seen=None):
    """A server that speaks Web3Signer's eth1 API, or lies."""

    class Web3Signer(BaseHTTPRequestHandler):
        def do_GET(self):
            keys = ["0x" + PublicKey.from_secret(key).format(compressed=False)[1:].hex() for key in (OTHER, KEY)]
            self.respond(200, json.dumps(keys).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if seen is not None:
                seen.append((self.path, self.headers.get("Authorization")))
            self.respond(*answer(bytes.fromhex(body["data"][2:])))

        def respond(self, status, content):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Web3Signer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def signed(data, key=KEY):
    return b"0x" + eip712.sign(eip712.keccak(data), key).hex().encode()


def test_a_remote_signer_signs_what_it_hashes_itself(tmp_path):
    token = tmp_path / "token"
    token.write_text("opensesame\n")
    token.chmod(0o600)
    seen = []
    with signing(lambda data: (200, signed(data)), seen) as url:
        signer = RemoteSigner(url, ADDRESS, token)
        assert eip712.recover(eip712.keccak(MESSAGE), signer.sign(MESSAGE)) == ADDRESS
    public = PublicKey.from_secret(KEY).format(compressed=False)[1:].hex()
    assert seen == [(f"/api/v1/eth1/sign/0x{public}", "Bearer opensesame")]
    assert "opensesame" not in repr(signer)


LIES = {
    "another key": lambda data: (200, signed(data, OTHER)),
    "another message": lambda data: (200, signed(b"other")),
    "high s": lambda data: (200, high(signed(data))),
    "no signature": lambda data: (200, b"0x1234"),
    "without end": lambda data: (200, b"0x" + b"00" * 10_000),
    "not found": lambda data: (404, b"no such key"),
    "elsewhere": lambda data: (302, b""),
    "broken": lambda data: (500, signed(data)),
    "not text": lambda data: (200, b"\xff\xfe"),
}


def high(signature):
    """The same signature in its other spelling (EIP-2)."""
    raw = bytes.fromhex(signature[2:].decode())
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    s = order - int.from_bytes(raw[32:64], "big")
    return b"0x" + (raw[:32] + s.to_bytes(32, "big") + bytes([55 - raw[64]])).hex().encode()


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_remote_signer_that_lies_is_away(lie):
    with signing(lie) as url, pytest.raises(Unavailable):
        RemoteSigner(url, ADDRESS).sign(MESSAGE)


def test_a_remote_signer_that_is_away_delays_and_loses_nothing(record):
    task = record.check(work())
    with signing(lambda data: (500, b"")) as url:
        record.signer = RemoteSigner(url, ADDRESS)
        record.judge()
    assert record.stage(task) == "accepted"
    assert "remote signer" in record.store.task(task).task.detail
    record.clock.now = NOW + 60
    with signing(lambda data: (200, signed(data))) as url:
        record.signer = RemoteSigner(url, ADDRESS)
        record.judge()
    assert record.stage(task) == "attested"
    assert record.store.attestation_of(task).document["signer"] == ADDRESS


@pytest.mark.parametrize("url", ["http://signer.example", "ftp://127.0.0.1", "signer", ""])
def test_a_remote_signer_is_reached_safely_or_not_at_all(url):
    with pytest.raises(Malformed, match="ASSAY_SIGNER_URL"):
        RemoteSigner(url, ADDRESS)
    with pytest.raises(Malformed, match="ASSAY_SIGNER_ADDRESS"):
        RemoteSigner("https://signer.example", "0x12")
