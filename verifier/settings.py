"""What a deployment chooses. Nothing here changes a verdict: that belongs to a policy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu.device import DEFAULT
from proof.errors import Malformed

DATA = "assay-data"


@dataclass(frozen=True)
class Settings:
    data: Path  # database, blobs and key of the embedded default
    database: str  # SQLAlchemy URL
    redis: str | None  # None: `assay serve` starts an embedded Valkey
    key: Path | None  # the attestation key; None: one is made under `data` at the first start
    lease: float = 20.0  # seconds that a worker process may be silent before its task goes to another
    attempts: int = 5  # before a task without verdict stalls
    validity: int = 30 * 86_400  # seconds that an attestation is valid
    device: str = DEFAULT  # where worker processes check: cpu, cuda, or the CUDA device if there is one

    @classmethod
    def from_env(cls, environ: Mapping[str, str], data: Path | None = None) -> "Settings":
        """Read ASSAY_*; `data` given on a command line wins. Raises Malformed naming the variable."""
        folder = (data or Path(environ.get("ASSAY_DATA", DATA))).resolve()
        key = environ.get("ASSAY_KEY_FILE")
        return cls(
            data=folder,
            database=environ.get("ASSAY_DATABASE_URL", f"sqlite:///{folder / 'assay.db'}"),
            redis=environ.get("ASSAY_REDIS_URL"),
            key=Path(key) if key else None,
            lease=_number(environ, "ASSAY_LEASE_SECONDS", cls.lease),
            attempts=int(_number(environ, "ASSAY_ATTEMPTS", cls.attempts)),
            validity=int(_number(environ, "ASSAY_ATTESTATION_SECONDS", cls.validity)),
            device=environ.get("ASSAY_DEVICE", cls.device),
        )

    @property
    def default_key(self) -> Path:
        return self.data / "keys" / "attester.key"


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 2**31:
        raise Malformed(f"{name}: not a positive number")
    return value
