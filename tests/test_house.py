"""The house's rules: floors, imports, names, and what importing may do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("proof", "gpu", "prover", "verifier", "api")
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")) + [ROOT / "assay.py"]
BANNED = {"utils", "helpers", "common", "base", "core", "manager", "handler", "service", "types", "misc", "legacy"}
WEB = ("fastapi", "starlette", "uvicorn", "redis", "rq", "sqlalchemy", "pydantic", "typer")
ON_GPU_HOSTS = ("gpu.plan", "gpu.reach", "gpu.hashing", "prover.prove", "prover.engines.onnxruntime")


def run(program: str) -> None:
    """Run a program in a fresh interpreter; it must succeed."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_imports_only_go_down():
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("module", ON_GPU_HOSTS)
def test_a_host_without_web_stack_imports(module):
    block = f"import sys\nfor name in {WEB!r}: sys.modules[name] = None\nimport {module}"
    run(block)


def test_importing_opens_no_socket_and_compiles_nothing():
    block = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('a socket at import')\n"
        "socket.socket.connect = refuse\n"
        "import prover.cli, verifier.cli, verifier.offline, api.cli\n"
        "assert not {'cupy', 'onnxruntime', 'cloudpickle'} & set(sys.modules)\n"
    )
    run(block)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_a_docstring_a_good_name_and_no_forbidden_words(path):
    text = path.read_text()
    assert text.startswith('"""') or path.name == "__main__.py"
    assert not BANNED & set(path.stem.split("_"))
    assert not re.search(r"^\s*(import pickle|from pickle)|except Exception|except:|__global__", text, re.MULTILINE)
