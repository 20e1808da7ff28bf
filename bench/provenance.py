"""Where figures come from: date, commit, machine, packages."""

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(command: str, packages: Iterable[str]) -> dict[str, Any]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    here = Path(__file__).parent
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.getoutput(f"git -C {here} describe --always --dirty --abbrev=40 --exclude='*'"),
        "machine": {"cpu": cpu.partition(": ")[2], "cores": os.cpu_count(), "system": platform.system()},
        "packages": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
