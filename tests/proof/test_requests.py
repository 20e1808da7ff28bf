"""A worker's signed request: for one service, action, task and content, until it expires; held against eth_account."""

from dataclasses import replace

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data

from proof.attestation import key_address
from proof.errors import Malformed, Rejected
from proof.messages import Reward
from proof.requests import NOTHING, Action, WorkerRequest, origin, sign_request, verify_request

KEY = bytes.fromhex("4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318")
SIGNER = key_address(KEY)
REWARD = Reward(chain_id=31337, contract="0x" + "c0" * 20, token="0x" + "70" * 20, amount=1)
REQUEST = WorkerRequest("https://assay.example", Action.COMMIT, bytes([1] * 32), bytes([2] * 32), 1_890_000_300)


def by_hand(request, reward):
    """As a wallet signs it."""
    fields = (("origin", "string"), ("action", "string"), ("task", "bytes32"), ("content", "bytes32"))
    types = {"WorkerRequest": [{"name": n, "type": t} for n, t in (*fields, ("expiresAt", "uint64"))]}
    domain = {
        "name": "Assay",
        "version": "1",
        "chainId": reward.chain_id if reward else 0,
        "verifyingContract": reward.contract if reward else "0x" + "00" * 20,
    }
    message = {
        "origin": request.origin,
        "action": str(request.action),
        "task": request.task,
        "content": request.content,
        "expiresAt": request.expires_at,
    }
    return bytes(Account.sign_message(encode_typed_data(domain, types, message), KEY).signature)


@pytest.mark.parametrize("reward", [REWARD, None])
@pytest.mark.parametrize("action", Action)
def test_a_wallet_signs_the_same(action, reward):
    request = replace(REQUEST, action=action)
    signature = sign_request(request, reward, KEY)
    assert signature == by_hand(request, reward)
    verify_request(request, reward, signature, SIGNER)


LIES = {
    "another service": {"origin": "https://other.example"},
    "another port": {"origin": "https://assay.example:8443"},
    "another action": {"action": Action.PROVE},
    "another task": {"task": bytes([9] * 32)},
    "other content": {"content": NOTHING},
    "a later end": {"expires_at": REQUEST.expires_at + 1},
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES.keys())
def test_a_signature_is_for_one_request(change):
    signature = sign_request(REQUEST, REWARD, KEY)
    with pytest.raises(Rejected):
        verify_request(replace(REQUEST, **change), REWARD, signature, SIGNER)


@pytest.mark.parametrize("reward", [None, replace(REWARD, chain_id=1), replace(REWARD, contract="0x" + "c1" * 20)])
def test_a_signature_is_for_one_chain_and_contract(reward):
    with pytest.raises(Rejected):
        verify_request(REQUEST, reward, sign_request(REQUEST, REWARD, KEY), SIGNER)


def test_the_price_is_not_part_of_the_domain():
    verify_request(REQUEST, replace(REWARD, amount=2), sign_request(REQUEST, REWARD, KEY), SIGNER)


@pytest.mark.parametrize("url", ["https://Assay.Example/v1/tasks", "https://assay.example", " https://assay.example/ "])
def test_an_origin_is_scheme_and_host(url):
    assert origin(url) == "https://assay.example"


@pytest.mark.parametrize("url", ["", "assay.example", "ftp://a", "https://", "unix:///tmp/s", "https://" + "a" * 300])
def test_what_has_no_origin_is_malformed(url):
    with pytest.raises(Malformed):
        origin(url)
