"""Benchmarks share the tests' world; `bench_*` is collected here only."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
