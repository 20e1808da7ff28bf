"""Where there is a CUDA device and NVIDIA's compute-sanitizer, every kernel runs under its memory and race checkers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.device import select

SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.skipif(select("auto") is None or not SANITIZER, reason="no CUDA device, or no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_run_clean(tool):
    files = sorted(str(path) for path in Path(__file__).parent.glob("test_device_*.py"))
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cuda", *files]
    done = subprocess.run(
        [str(SANITIZER), "--tool", tool, "--error-exitcode", "86", *tests],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
