"""Makes `world` importable from every test folder, and says which servers the tests run against."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import servers


def pytest_report_header() -> str:
    return servers.describe()
