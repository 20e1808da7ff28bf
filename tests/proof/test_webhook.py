"""Standard Webhooks: the reference libraries' vector, and every way in which a delivery can be false."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proof import webhook
from proof.errors import Malformed, Reason, Rejected

# https://github.com/standard-webhooks/standard-webhooks, the test vector of its libraries
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
AT = 1614265330
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
HEADERS = {"webhook-id": ID, "webhook-timestamp": str(AT), "webhook-signature": SIGNATURE}
OTHER = "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc="


def test_the_published_vector():
    assert webhook.sign(SECRET, ID, AT, BODY) == HEADERS
    webhook.verify(SECRET, HEADERS, BODY, AT)
    webhook.verify(SECRET.removeprefix("whsec_"), HEADERS, BODY, AT)


def test_header_names_in_any_case():
    webhook.verify(SECRET, {name.title(): value for name, value in HEADERS.items()}, BODY, AT)


@pytest.mark.parametrize(
    "signatures", [f"{OTHER} {SIGNATURE}", f"v1a,hnO3f9T8Ytu9 {SIGNATURE} {OTHER}", f"nonsense v1,~ {SIGNATURE}"]
)
def test_one_of_several_signatures_is_enough(signatures):
    webhook.verify(SECRET, HEADERS | {"webhook-signature": signatures}, BODY, AT)


@pytest.mark.parametrize("late", [-300, 300])
def test_clocks_may_be_apart(late):
    webhook.verify(SECRET, HEADERS, BODY, AT + late)


@given(st.binary(max_size=200), st.integers(0, 2**40), st.binary(min_size=24, max_size=64))
def test_what_is_signed_verifies(body, at, key):
    secret = "whsec_" + base64.b64encode(key).decode()
    webhook.verify(secret, webhook.sign(secret, "ab", at, body), body, at)


def test_secrets_are_fresh():
    first, second = webhook.new_secret(), webhook.new_secret()
    assert first != second
    webhook.verify(first, webhook.sign(first, ID, AT, BODY), BODY, AT)


LIES = {
    "another body": {"body": BODY + b" "},
    "another id": {"headers": HEADERS | {"webhook-id": "msg_other"}},
    "another moment": {"headers": HEADERS | {"webhook-timestamp": str(AT + 1)}},
    "another signature": {"headers": HEADERS | {"webhook-signature": OTHER}},
    "another scheme": {"headers": HEADERS | {"webhook-signature": SIGNATURE.replace("v1,", "v2,")}},
    "no scheme": {"headers": HEADERS | {"webhook-signature": SIGNATURE.removeprefix("v1,")}},
    "no signature": {"headers": HEADERS | {"webhook-signature": ""}},
    "half a signature": {"headers": HEADERS | {"webhook-signature": SIGNATURE[:25] + "="}},
    "another secret": {"secret": webhook.new_secret()},
    "too late": {"now": AT + 301},
    "too early": {"now": AT - 301},
    "no clock": {"now": float("nan")},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_no_lie_verifies(lie):
    with pytest.raises(Rejected) as rejection:
        webhook.verify(**{"secret": SECRET, "headers": HEADERS, "body": BODY, "now": AT} | lie)
    assert rejection.value.reason is Reason.SIGNATURE


def without(name):
    return {key: value for key, value in HEADERS.items() if key != name}


NONSENSE = {
    "no id": {"headers": without("webhook-id")},
    "no timestamp": {"headers": without("webhook-timestamp")},
    "no signature": {"headers": without("webhook-signature")},
    "an id with a dot": {"headers": HEADERS | {"webhook-id": "a.b"}},
    "an empty id": {"headers": HEADERS | {"webhook-id": ""}},
    "a signed moment": {"headers": HEADERS | {"webhook-timestamp": "-1"}},
    "no number": {"headers": HEADERS | {"webhook-timestamp": "٣"}},
    "an endless number": {"headers": HEADERS | {"webhook-timestamp": "1" * 5000}},
    "endless signatures": {"headers": HEADERS | {"webhook-signature": f"{SIGNATURE} " * 20}},
    "a short secret": {"secret": "whsec_" + base64.b64encode(bytes(23)).decode()},
    "a long secret": {"secret": "whsec_" + base64.b64encode(bytes(65)).decode()},
    "no base64": {"secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS~"},
    "no ASCII": {"secret": "whsec_é"},
}


@pytest.mark.parametrize("lie", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_malformed(lie):
    with pytest.raises(Malformed):
        webhook.verify(**{"secret": SECRET, "headers": HEADERS, "body": BODY, "now": AT} | lie)


@pytest.mark.parametrize("id_", ["", "a.b", "a b", "a\nb", "x" * 257])
def test_an_id_that_could_be_read_otherwise_is_not_signed(id_):
    with pytest.raises(Malformed):
        webhook.sign(SECRET, id_, AT, BODY)
