"""Benchmarks share the tests' world; `bench_*` is collected here only. Results are kept as medians, without samples."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keep what a README quotes: names, medians in seconds, rounds, figures, machine and commit."""
    output_json["benchmarks"] = [
        {
            "group": entry["group"],
            "name": entry["name"],
            "median_seconds": entry["stats"]["median"],
            "min_seconds": entry["stats"]["min"],
            "rounds": entry["stats"]["rounds"],
            "figures": entry["extra_info"],
        }
        for entry in output_json["benchmarks"]
    ]
    machine = output_json["machine_info"]
    cpu = machine.get("cpu", {})
    output_json["machine_info"] = {
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "python": machine.get("python_version"),
        "system": machine.get("system"),
    }
