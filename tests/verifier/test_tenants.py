"""API keys: shown once, known by digest, ended by time or by hand."""

import pytest
from record import NOW, TENANT

from proof.errors import Conflict, Malformed, Rejected
from verifier import tenants


@pytest.fixture
def key(record):
    return tenants.create(record.database, TENANT, "ci", ["tasks", "models", "tasks"], NOW, NOW + 100)


def test_a_key_is_found_by_its_token_and_kept_by_its_digest(record, key):
    row, token = key
    found = tenants.find(record.database, token, NOW)
    assert (found.id, found.tenant, found.scopes) == (row.id, TENANT, ["models", "tasks"])
    secret = token.rpartition(row.id + "_")[2]
    assert len(secret) == 43
    assert secret not in repr(tenants.listed(record.database))


def test_two_keys_share_nothing(record, key):
    row, token = tenants.create(record.database, TENANT, "ci", ["admin"], NOW, None)
    assert row.id != key[0].id
    with pytest.raises(Rejected):
        tenants.find(record.database, f"assay_{row.id}_{key[1][-43:]}", NOW)


@pytest.mark.parametrize("bend", [str.upper, lambda t: t[:-1], lambda t: t + "A", lambda t: "x" + t, lambda t: ""])
def test_what_is_no_token_is_refused(record, key, bend):
    with pytest.raises(Rejected, match="not an API key"):
        tenants.find(record.database, bend(key[1]), NOW)


def test_a_key_ends_with_its_time_or_by_hand(record, key):
    with pytest.raises(Rejected):
        tenants.find(record.database, key[1], NOW + 100)
    tenants.revoke(record.database, key[0].id, NOW)
    with pytest.raises(Rejected):
        tenants.find(record.database, key[1], NOW)
    tenants.revoke(record.database, key[0].id, NOW + 5)
    assert tenants.listed(record.database)[0].revoked == NOW
    with pytest.raises(Conflict, match="no API key"):
        tenants.revoke(record.database, "ab" * 8, NOW)


@pytest.mark.parametrize(
    ("tenant", "name", "scopes", "expires"),
    [("", "a", ["tasks"], None), ("A", "a", ["tasks"], None), ("a", "../b", ["tasks"], None), ("a", "a", [], None),
     ("a", "a", ["root"], None), ("a" * 64, "a", ["tasks"], None), ("a", "a", ["tasks"], NOW)],
)  # fmt: skip
def test_odd_keys_are_not_made(record, tenant, name, scopes, expires):
    with pytest.raises(Malformed):
        tenants.create(record.database, tenant, name, scopes, NOW, expires)
    assert tenants.listed(record.database) == []
