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


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1e12"])
def test_a_number_that_makes_no_sense_is_refused_by_name(value):
    with pytest.raises(Malformed, match="ASSAY_LEASE_SECONDS"):
        Settings.from_env({"ASSAY_LEASE_SECONDS": value})
