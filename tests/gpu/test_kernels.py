"""Every kernel compiles for the GPUs that matter, without spills, says what it does, and is launched by somebody."""

import re
from functools import cache

import numpy as np
import pytest
from cuda.bindings import nvrtc
from host_device import HostDevice, kernels

from gpu import device
from gpu.kernels import source
from proof.errors import Malformed

GPU = source.FOLDER.parent
ARCHITECTURES = ("sm_80", "sm_90")
REGISTERS = 65536  # of a multiprocessor
USAGE = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


@cache
def compiled(file, architecture):
    """What the compiler says of each kernel: bytes of stack, spilled and loaded again, and registers."""
    _, program = nvrtc.nvrtcCreateProgram(source.text(file).encode(), f"{file}.cu".encode(), 0, [], [])
    options = [*source.OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    said = log.decode(errors="replace")
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, said
    assert "warning" not in said, said
    return {name: tuple(map(int, numbers)) for name, *numbers in USAGE.findall(said)}


def test_there_are_kernels():
    assert len(source.files()) >= 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", source.files())
def test_a_file_compiles_without_spills(file, architecture):
    found = compiled(file, architecture)
    assert found.keys() == kernels(file).keys()
    for name, (stack, stored, loaded, registers) in found.items():
        threads, _ = kernels(file)[name]
        assert (stored, loaded) == (0, 0), f"{name} spills"
        assert stack == 0, f"{name} has a stack of {stack} bytes"
        assert registers * threads <= REGISTERS, f"{name} takes {registers} registers"


@pytest.mark.parametrize("file", source.files())
def test_a_file_begins_with_its_contract(file):
    first = (source.FOLDER / f"{file}.cu").read_text().split("\n\n")[0]
    assert first.startswith("// ")
    assert all(line.startswith("//") for line in first.splitlines())
    assert len(first) > 100


@pytest.mark.parametrize("file", source.files())
def test_every_file_is_launched_by_somebody(file):
    assert any(f'"{file}"' in path.read_text() for path in GPU.rglob("*.py"))


def test_names_of_kernels_are_unique():
    names = [name for file in source.files() for name in kernels(file)]
    assert len(names) == len(set(names))


def test_auto_is_the_cpu_where_there_is_no_device():
    found = device.select("auto")
    assert found is None or found.name
    assert device.select("cpu") is None


@pytest.mark.skipif(device.select("auto") is not None, reason="there is a CUDA device")
def test_asking_for_a_device_that_is_not_there_says_what_to_do():
    with pytest.raises(Malformed, match="ASSAY_DEVICE=cpu"):
        device.select("cuda")


def test_another_word_for_a_device_is_refused():
    with pytest.raises(Malformed, match="auto, cpu, cuda"):
        device.select("tpu")


def test_the_host_device_finds_what_a_gpu_would_not_forgive(tmp_path, monkeypatch):
    """Threads at different barriers, and writing beyond an array."""
    (tmp_path / "bad.cu").write_text(
        "// bad\n"
        'extern "C" __global__ void __launch_bounds__(64) diverge(int* x) {\n'
        "    if (threadIdx.x < 40) __syncthreads();\n    else __shfl_xor_sync(~0u, x[0], 1);\n}\n"
        'extern "C" __global__ void __launch_bounds__(64) overrun(int* x) { x[threadIdx.x] = 1; }\n'
    )
    monkeypatch.setattr(source, "FOLDER", tmp_path)
    host = HostDevice()
    with pytest.raises(AssertionError, match="different places"):
        host.launch("bad", "diverge", 1, 64, host.zeros(64, np.int32))
    host.launch("bad", "overrun", 1, 64, host.zeros(64, np.int32))
    with pytest.raises(AssertionError, match="outside"):
        host.launch("bad", "overrun", 1, 64, host.zeros(63, np.int32))
