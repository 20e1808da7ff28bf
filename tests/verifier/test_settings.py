"""Settings come from the environment once, are documented, and are refused by name when they make no sense."""

import re
from pathlib import Path

import pytest

from proof.errors import Malformed
from verifier import settings
from verifier.settings import Settings

FLOOR = Path(settings.__file__).parent


def test_every_setting_stands_in_the_readme():
    names = set(re.findall(r'"(ASSAY_[A-Z_]+)"', (FLOOR / "settings.py").read_text()))
    assert names == set(re.findall(r"^\| `(ASSAY_[A-Z_]+)` \|", (FLOOR / "README.md").read_text(), re.MULTILINE))


def test_the_command_line_wins_over_the_environment(tmp_path):
    made = Settings.from_env({"ASSAY_DATA": "/elsewhere", "ASSAY_LEASE_SECONDS": "2.5"}, tmp_path)
    assert (made.data, made.lease, made.redis, made.key) == (tmp_path, 2.5, None, None)
    assert made.database == f"sqlite:///{tmp_path}/assay.db"


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e12"])
def test_a_number_that_makes_no_sense_is_refused_by_name(value):
    with pytest.raises(Malformed, match="ASSAY_LEASE_SECONDS"):
        Settings.from_env({"ASSAY_LEASE_SECONDS": value})


def test_an_unknown_variable_is_an_error_and_an_empty_one_is_none():
    with pytest.raises(Malformed, match="ASSAY_LEASES"):
        Settings.from_env({"ASSAY_LEASES": "1"})
    assert Settings.from_env({"ASSAY_REDIS_URL": "", "ASSAY_LEASE_SECONDS": ""}).lease == Settings.lease


def test_urls_with_passwords_come_from_files_and_are_not_shown(tmp_path):
    (tmp_path / "url").write_text("postgresql+psycopg://assay:hunter2@db/assay\n")
    made = Settings.from_env({"ASSAY_DATABASE_URL_FILE": str(tmp_path / "url")})
    assert made.database.endswith("hunter2@db/assay")
    assert "hunter2" not in repr(made)
    with pytest.raises(Malformed, match="choose one"):
        Settings.from_env({"ASSAY_REDIS_URL_FILE": "a", "ASSAY_REDIS_URL": "b"})
    with pytest.raises(Malformed, match="ASSAY_REDIS_URL_FILE"):
        Settings.from_env({"ASSAY_REDIS_URL_FILE": str(tmp_path / "none")})
