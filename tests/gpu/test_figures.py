"""The script that measures a device runs every section there, and on the CPU, and says where its figures come from."""

import json
import math

import pytest
from host_device import HostDevice

from bench import device as figures


@pytest.mark.parametrize("device", [None, HostDevice()], ids=["cpu", "host"])
@pytest.mark.parametrize("section", figures.SECTIONS.values(), ids=figures.SECTIONS.keys())
def test_every_section_has_figures(section, device):
    rows = section(figures.Bench(device, quick=True))
    assert rows
    for row in rows:
        assert row["what"]
        assert row["beside"]
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("seconds", "other_seconds", "ratio"))


def test_a_section_that_fails_stands_in_its_place(tmp_path, monkeypatch, capsys):
    def broken(bench):
        raise RuntimeError("no figures")

    monkeypatch.setattr(figures, "SECTIONS", {"one": broken, "recomputed": figures.recomputed})
    path = tmp_path / "figures.json"
    with pytest.raises(figures.typer.Exit):
        figures.main(choice="cpu", to=path, quick=True)
    found = json.loads(path.read_text())
    assert found["one"] == "RuntimeError: no figures"
    assert found["recomputed"][0]["seconds"] > 0
    assert found["device"] == "cpu"
    assert found["commit"]
