"""Structured logs on stderr: one line an event, with its fields; for people, as logfmt, or as JSON lines.

Nothing that looks like a secret is written, whatever was passed: tokens, webhook secrets, passwords in URLs.
"""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

from proof.errors import Malformed

FORMS = ("auto", "console", "logfmt", "json")
MAX_VALUE = 2000  # characters of one field
LOUD = ("alembic", "httpx", "rq", "uvicorn.access")  # libraries that say too much

_SECRET = re.compile(
    r"(assay_[0-9a-f]{16}_)[A-Za-z0-9_-]+|(whsec_)[A-Za-z0-9+/=]+|((?:Bearer|Basic) )\S+|(://[^\s:/@]*:)[^\s@/]+(?=@)",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"[^\s\"=\x00-\x1f\x7f]+")


def configure(form: str, role: str) -> None:
    """Log to stderr as this process; `form` is one of FORMS. Raises Malformed for another."""
    if form not in FORMS:
        raise Malformed(f"ASSAY_LOG: {form!r} is none of {', '.join(FORMS)}")
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "logfmt"
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(form, role))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)


def say(log: logging.Logger, event: str, level: int = logging.INFO, **fields: Any) -> None:
    """One line: what happened, such as task.accepted, and to what. Fields that are None are left out."""
    log.log(level, event, extra={"fields": {name: value for name, value in fields.items() if value is not None}})


def redacted(text: str) -> str:
    """The text without what looks like a secret."""
    return _SECRET.sub(lambda found: next(part for part in found.groups() if part) + "[redacted]", text)


class _Lines(logging.Formatter):
    def __init__(self, form: str, role: str) -> None:
        super().__init__()
        self._form, self._role = form, role

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": at, "level": record.levelname.lower(), "role": self._role, "event": record.getMessage()}
        line |= getattr(record, "fields", None) or {"logger": record.name}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        told = {name: _value(value) for name, value in line.items()}
        if self._form == "json":
            return json.dumps(told, ensure_ascii=True)
        if self._form == "logfmt":
            return " ".join(f"{name}={_quoted(value)}" for name, value in told.items())
        rest = " ".join(f"{name}={_quoted(value)}" for name, value in list(told.items())[4:])
        return f"{at[11:]} {record.levelname[0]} {self._role:7} {told['event']}  {rest}"


def _value(value: object) -> object:
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return round(value, 6)
    return redacted(str(value))[:MAX_VALUE]


def _quoted(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
