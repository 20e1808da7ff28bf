"""One line an event, whatever it holds, and no secret in it."""

import json
import logging
import subprocess
import sys

import pytest

from proof.errors import Malformed
from verifier import logs

TOKEN = "assay_0123456789abcdef_" + "s3cr3t_" * 6 + "x"
SECRETS = {
    "an API key": TOKEN,
    "a header": f"Authorization: Bearer {TOKEN}",
    "another header": "authorization: basic dXNlcjpodW50ZXIy",
    "a webhook's secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "a URL": "postgresql+psycopg://assay:hunter2@db/assay",
}


@pytest.fixture(params=["console", "logfmt", "json"])
def said(request, capsys):
    """What one event becomes in each form."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def made(event, **fields):
        logs.configure(request.param, "test")
        logs.say(logging.getLogger("assay.test"), event, **fields)
        return capsys.readouterr().err

    yield made
    root.handlers[:], root.level = before, level


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
def test_no_secret_is_written(said, secret):
    line = said("task.posted", detail=secret, other=f"before {secret} after")
    for part in ("s3cr3t", "hunter2", "MfKQ9r8G", "dXNlcjpodW50ZXIy"):
        assert part not in line
    assert line.count("redacted") == 2


def test_a_line_is_one_line(said):
    line = said("task.stalled", detail='a\nlevel=error event=forged "quoted"\x1b[31m\r', task="ab" * 32, seconds=0.25)
    assert line.count("\n") == 1
    assert "\r" not in line
    assert "\x1b" not in line
    assert "ab" * 32 in line
    assert "0.25" in line


def test_json_lines_are_json_and_leave_out_what_is_not_there():
    program = (
        "import logging; from verifier import logs; logs.configure('json', 'work');"
        "logs.say(logging.getLogger('a'), 'task.accepted', task='x', reason=None, seconds=1.5)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    line = json.loads(done.stderr)
    assert {name: line[name] for name in ("level", "role", "event", "task", "seconds")} == {
        "level": "info", "role": "work", "event": "task.accepted", "task": "x", "seconds": 1.5,
    }  # fmt: skip
    assert "reason" not in line


def test_a_form_that_is_none_is_refused_by_name():
    with pytest.raises(Malformed, match="ASSAY_LOG"):
        logs.configure("xml", "test")
