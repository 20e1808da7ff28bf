"""What is deployed names commands and settings that exist, and its units are ones that systemd takes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from assay import FLOORS
from verifier.settings import FILE, SECRETS, VARIABLES

DEPLOY = Path(__file__).parent.parent / "api" / "deploy"
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file())
UNITS = sorted(DEPLOY.glob("*.service"))
OURS = {"ASSAY_HOST"}  # of compose.yaml and the Caddyfile


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_setting_is_one_that_is_read(path):
    known = {*VARIABLES.values(), *(VARIABLES[name] + FILE for name in SECRETS)} | OURS
    assert set(re.findall(r"ASSAY_[A-Z_]+", path.read_text())) <= known


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_runs_a_command_that_there_is(path):
    (command,) = re.findall(r"^ExecStart=/opt/assay/bin/assay (\S+)", path.read_text(), re.MULTILINE)
    assert command in {name for names in FLOORS.values() for name in names}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_takes_a_unit(path, tmp_path):
    unit = tmp_path / path.name.replace("@.", "@1.")
    unit.write_text(path.read_text().replace("/opt/assay/bin/assay", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if path.stem.split("@")[0] in line and "Unit" not in line]
    assert told == []


def test_services_run_commands_that_there_are():
    commands = re.findall(r'command: \["(\w+)"', (DEPLOY / "compose.yaml").read_text())
    known = {name for names in FLOORS.values() for name in names} | {"redis"}
    assert set(commands) <= known
    assert {"init", "serve", "work"} <= set(commands)
