"""What a deployment chooses. Nothing here changes a verdict: that belongs to a policy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gpu.device import DEFAULT
from proof.errors import Malformed

DATA = "assay-data"
LONGEST_LEASE = 600.0  # seconds


@dataclass(frozen=True)
class Settings:
    """Read from the environment by `from_env`; VARIABLES says which variable is which field."""

    data: Path  # blobs; database and keys of the embedded default
    database: str = field(repr=False)  # SQLAlchemy URL
    redis: str | None = field(default=None, repr=False)  # None: `assay serve` starts an embedded Valkey
    key: Path | None = (
        None  # the attestation key: a keystore V3, or 64 hex digits; None: the one that `assay init` made
    )
    key_password: Path | None = None  # the file with the keystore's password
    signer_url: str | None = None  # a remote signer in place of a key file
    signer_address: str | None = None
    signer_token: Path | None = None
    lease: float = 20.0  # seconds that a worker process may be silent before its tasks go to another
    attempts: int = 5  # before a task without verdict stalls
    validity: int = 30 * 86_400  # seconds that an attestation is valid
    device: str = DEFAULT  # where worker processes check: cpu, cuda, or the CUDA device if there is one
    backlog: int = 10_000  # tasks in work beyond which no more are taken
    orphan: float = 3600.0  # seconds after which a file that nothing points to is removed
    origins: tuple[str, ...] = ()  # scheme://host[:port] that callers dial; none: the address that is listened on
    rate_key: str = "6000/minute"  # requests of one API key or worker
    rate_address: str = "6000/minute"  # requests of one client address
    body_stall: float = 30.0  # seconds that a body may pause
    head: float = 10.0  # seconds that the head of a request may take
    webhook_networks: tuple[str, ...] = ()  # private networks that webhooks may lead to
    proxies: tuple[str, ...] = ()  # addresses whose X-Forwarded-For is believed
    log: str = "auto"  # console, logfmt or json; auto: console on a terminal, else logfmt

    @classmethod
    def from_env(cls, environ: Mapping[str, str], data: Path | None = None) -> "Settings":
        """Read ASSAY_*; `data` given on a command line wins. Raises Malformed naming the variable."""
        known = {*VARIABLES.values(), *(VARIABLES[name] + FILE for name in SECRETS), *CLIENT}
        unknown = [name for name in environ if name.startswith("ASSAY_") and name not in known]
        if unknown:
            raise Malformed(f"{unknown[0]}: no such setting; verifier/README.md lists them")
        folder = (data or Path(environ.get("ASSAY_DATA") or DATA)).resolve()
        given: dict[str, Any] = {"data": folder, "database": f"sqlite:///{folder / 'assay.db'}"}
        for entry in fields(cls):
            name = VARIABLES[entry.name]
            text = _from_file(name, environ) if entry.name in SECRETS else environ.get(name)
            if text and entry.name != "data":
                given[entry.name] = _READ[entry.type](name, text)
        made = cls(**given)
        if made.lease > LONGEST_LEASE:
            raise Malformed(f"ASSAY_LEASE_SECONDS: more than {LONGEST_LEASE:.0f}; a task would wait that long")
        return made

    @property
    def default_key(self) -> Path:
        return self.data / "keys" / "attester.json"

    @property
    def default_password(self) -> Path:
        return self.data / "keys" / "attester.password"


VARIABLES = {
    "data": "ASSAY_DATA",
    "database": "ASSAY_DATABASE_URL",
    "redis": "ASSAY_REDIS_URL",
    "key": "ASSAY_KEY_FILE",
    "key_password": "ASSAY_KEY_PASSWORD_FILE",
    "signer_url": "ASSAY_SIGNER_URL",
    "signer_address": "ASSAY_SIGNER_ADDRESS",
    "signer_token": "ASSAY_SIGNER_TOKEN_FILE",
    "lease": "ASSAY_LEASE_SECONDS",
    "attempts": "ASSAY_ATTEMPTS",
    "validity": "ASSAY_ATTESTATION_SECONDS",
    "device": "ASSAY_DEVICE",
    "backlog": "ASSAY_BACKLOG",
    "orphan": "ASSAY_ORPHAN_SECONDS",
    "origins": "ASSAY_ORIGINS",
    "rate_key": "ASSAY_RATE_KEY",
    "rate_address": "ASSAY_RATE_ADDRESS",
    "body_stall": "ASSAY_BODY_STALL_SECONDS",
    "head": "ASSAY_HEAD_SECONDS",
    "webhook_networks": "ASSAY_WEBHOOK_NETWORKS",
    "proxies": "ASSAY_TRUSTED_PROXIES",
    "log": "ASSAY_LOG",
}
SECRETS = ("database", "redis")  # URLs that may hold a password: their variable with FILE names a file instead
FILE = "_FILE"
CLIENT = ("ASSAY_URL", "ASSAY_API_KEY")  # of those who call a service: prover/cli.py
MAX_SECRET_BYTES = 4096


def _from_file(name: str, environ: Mapping[str, str]) -> str | None:
    path = environ.get(name + FILE)
    if not path:
        return environ.get(name)
    if environ.get(name):
        raise Malformed(f"{name} and {name}{FILE} are both set: choose one")
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_SECRET_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Malformed(f"{name}{FILE}: cannot read {path}: {type(error).__name__}") from error


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 2**31:
        raise Malformed(f"{name}: not a positive number")
    return value


def _count(name: str, text: str) -> int:
    value = _seconds(name, text)
    if value != int(value):
        raise Malformed(f"{name}: not a whole number")
    return int(value)


def _path(_: str, text: str) -> Path:
    return Path(text)


def _text(_: str, text: str) -> str:
    return text.strip()


def _list(_: str, text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())


_READ: dict[Any, Callable[[str, str], Any]] = {
    float: _seconds,
    int: _count,
    str: _text,
    str | None: _text,
    Path | None: _path,
    tuple[str, ...]: _list,
}
