"""Keystores: the published vectors of version 3, other tools, bounded cost, and nothing of the secret ever shown."""

import json
import time

import pytest
from eth_account import Account

from proof.attestation import key_address
from proof.errors import Malformed
from verifier import keystore

KEY = bytes.fromhex("7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d")
PUBLISHED = {  # Web3 Secret Storage Definition, the two test vectors of version 3; the password is "testpassword"
    "pbkdf2": {
        "crypto": {
            "cipher": "aes-128-ctr",
            "cipherparams": {"iv": "6087dab2f9fdbbfaddc31a909735c1e6"},
            "ciphertext": "5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46",
            "kdf": "pbkdf2",
            "kdfparams": {
                "c": 262144,
                "dklen": 32,
                "prf": "hmac-sha256",
                "salt": "ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd",
            },
            "mac": "517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2",
        },
        "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
        "version": 3,
    },
    "scrypt": {
        "crypto": {
            "cipher": "aes-128-ctr",
            "cipherparams": {"iv": "83dbcc02d8ccb40e466191a123791e0e"},
            "ciphertext": "d172bf743a674da9cdad04534d56926ef8358534d458fffccd4e6ad2fbde479c",
            "kdf": "scrypt",
            "kdfparams": {
                "dklen": 32,
                "n": 262144,
                "p": 8,
                "r": 1,
                "salt": "ab0c7876052600dd703518d6fc3fe8984592145b591fc8fb5c6d43190334ba19",
            },
            "mac": "2103ac29920d71da29f15d75b4a16dbe95cfd7ff8faea1056c33131d846e3097",
        },
        "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
        "version": 3,
    },
}


@pytest.mark.parametrize("kdf", PUBLISHED)
def test_the_published_vectors(kdf):
    assert keystore.decrypt(PUBLISHED[kdf], b"testpassword") == KEY
    with pytest.raises(Malformed, match="password"):
        keystore.decrypt(PUBLISHED[kdf], b"testpassworD")


def test_other_tools_read_what_we_write_and_we_what_they_write():
    ours = keystore.encrypt(KEY, b"secret", n=1024)
    assert bytes(Account.decrypt(ours, "secret")) == KEY
    for kdf, iterations in (("scrypt", 1024), ("pbkdf2", 1000)):
        theirs = json.loads(json.dumps(Account.encrypt(KEY, "secret", kdf=kdf, iterations=iterations)))
        assert keystore.decrypt(theirs, b"secret") == KEY


def test_a_file_is_made_once_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.setattr(keystore, "SCRYPT_N", 1024)
    path = tmp_path / "keys" / "attester.json"
    address = keystore.create(path, b"secret", KEY)
    assert address == key_address(KEY)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert keystore.open_key(path, b"secret") == KEY
    assert KEY.hex() not in path.read_text()
    with pytest.raises(Malformed, match="never overwritten"):
        keystore.create(path, b"other")
    path.chmod(0o640)
    with pytest.raises(Malformed, match="0600"):
        keystore.open_key(path, b"secret")
    with pytest.raises(Malformed, match="assay init"):
        keystore.open_key(tmp_path / "none", b"secret")
    assert [entry.name for entry in path.parent.iterdir()] == ["attester.json"]


def test_a_wrong_password_shows_nothing(tmp_path, monkeypatch):
    path = tmp_path / "key.json"
    path.write_text(json.dumps(keystore.encrypt(KEY, b"secret", n=1024)))
    path.chmod(0o600)
    with pytest.raises(Malformed) as failure:
        keystore.open_key(path, b"hunter2")
    assert "hunter2" not in str(failure.value)
    assert str(path) in str(failure.value)


def bent(change):
    value = json.loads(json.dumps(PUBLISHED["scrypt"]))
    change(value, value["crypto"], value["crypto"]["kdfparams"])
    return value


LIES = {
    "another version": lambda v, c, k: v.update(version=1),
    "no crypto": lambda v, c, k: v.pop("crypto"),
    "another cipher": lambda v, c, k: c.update(cipher="aes-128-cbc"),
    "another kdf": lambda v, c, k: c.update(kdf="argon2"),
    "memory without end": lambda v, c, k: k.update(n=2**40),
    "blocks without end": lambda v, c, k: k.update(r=2**40),
    "passes without end": lambda v, c, k: k.update(p=2**20),
    "no power of two": lambda v, c, k: k.update(n=262143),
    "no cost": lambda v, c, k: k.update(n=1),
    "a longer key": lambda v, c, k: k.update(dklen=64),
    "a salt without end": lambda v, c, k: k.update(salt="ab" * 10_000),
    "a short text": lambda v, c, k: c.update(ciphertext="ab"),
    "iterations without end": lambda v, c, k: c.update(
        kdf="pbkdf2", kdfparams={"c": 2**40, "dklen": 32, "prf": "hmac-sha256", "salt": "ab"}
    ),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_what_costs_too_much_or_is_none_is_refused_at_once(lie):
    started = time.perf_counter()
    with pytest.raises(Malformed):
        keystore.decrypt(bent(lie), b"testpassword")
    assert time.perf_counter() - started < 0.1


def test_any_bytes_are_malformed(tmp_path):
    path = tmp_path / "key.json"
    for content in (b"", b"{", b"[]", b"null", b"{}", b"\xff" * 100, b'{"version":3}', b"{" * 20_000):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(Malformed):
            keystore.open_key(path, b"secret")
