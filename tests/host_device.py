"""A device for machines without one: the kernels' own sources, compiled for the host behind host_device.h.

Arrays lie between canaries, so that a kernel that writes outside them is found.
"""

import ctypes
import hashlib
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from gpu.device import bits
from gpu.kernels import source

HEADER = Path(__file__).parent / "host_device.h"
BUILT = Path(__file__).parent / ".kernels"
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC")
BARRIERS = ("__sync", "__shfl", "__ballot", "__any", "__all")
CANARY = 64
KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)(?:, \d+)?\) (\w+)\(([^)]*)\)')
C_TYPES = {
    np.int32: ctypes.c_int32,
    np.uint32: ctypes.c_uint32,
    np.int64: ctypes.c_int64,
    np.uint64: ctypes.c_uint64,
    np.float32: ctypes.c_float,
    np.float64: ctypes.c_double,
}
SCALARS = {
    "int": np.int32,
    "u32": np.uint32,
    "unsigned": np.uint32,
    "i64": np.int64,
    "u64": np.uint64,
    "float": np.float32,
    "double": np.float64,
}


class HostDevice:
    name = "host"
    place = "cpu"

    def __init__(self):
        self._guarded = []

    def free(self):
        return 2**32

    def array(self, values):
        plain = bits(values)
        memory = self.empty(plain.shape, plain.dtype)
        memory[...] = plain
        return memory

    def empty(self, shape, dtype):
        """Filled with 0xa5, so that what is read before it was written is not zero by chance."""
        shape = (shape,) if np.isscalar(shape) else tuple(shape)
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        room = np.full(size + 2 * CANARY + 64, 0xA5, np.uint8)
        start = -room.ctypes.data % 64 + CANARY
        array = room[start : start + size].view(dtype).reshape(shape)
        self._guarded = [*self._guarded[-63:], (room, start, size)]
        return array

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def numpy(self, memory):
        return np.array(memory)

    def pointer(self, memory):
        return memory.ctypes.data

    def pinned(self, nbytes):
        return self.empty(nbytes, np.uint8)

    def launch(self, file, kernel, grid, block, *args):
        x, y = grid if isinstance(grid, tuple) else (grid, 1)
        if not (x and y):
            return
        assert 0 < block <= 1024
        assert 0 < x < 2**31
        assert 0 < y < 2**16
        threads, parameters = kernels(file)[kernel]
        assert block <= threads, f"{kernel} is compiled for {threads} threads a block"
        assert len(parameters) == len(args), f"{kernel} takes {parameters}"
        values = [self._argument(kernel, *pair) for pair in zip(parameters, args, strict=True)]
        failed = getattr(_library(file), f"host_{kernel}")(*map(ctypes.c_uint32, (x, y, block)), *values)
        assert not failed, f"{kernel}: threads of a block wait at different places"
        for room, start, size in self._guarded:
            around = np.concatenate([room[start - CANARY : start], room[start + size :]])
            assert (around == 0xA5).all(), f"{kernel} wrote outside its arrays"

    def _argument(self, kernel, parameter, value):
        if isinstance(value, np.ndarray):
            assert "*" in parameter, f"{kernel}: {parameter} is no array"
            assert value.flags.c_contiguous
            return ctypes.c_void_p(value.ctypes.data)
        kind = parameter.removeprefix("const ").split()[0]
        assert type(value) is SCALARS[kind], f"{kernel}: {parameter} is given {type(value)}"
        return C_TYPES[SCALARS[kind]](value)


@cache
def kernels(file):
    """The kernels of a file: the threads of a block, and the parameters as written."""
    command = ["g++", "-E", "-P", "-x", "c++", "-"]
    expanded = subprocess.run(command, input=source.text(file), capture_output=True, text=True, check=True).stdout
    return {name: (int(threads), " ".join(own.split()).split(", ")) for threads, name, own in KERNEL.findall(expanded)}


def _wrapper(name, parameters, alone):
    names = ", ".join(parameter.split()[-1].lstrip("*") for parameter in parameters)
    return (
        f'extern "C" int host_{name}(unsigned gx, unsigned gy, unsigned bx, {", ".join(parameters)}) '
        f"{{ return run_grid(gx, gy, bx, {alone}, [&] {{ {name}({names}); }}); }}\n"
    )


@cache
def _library(file):
    text = source.text(file)
    alone = "false" if any(word in text for word in BARRIERS) else "true"
    wrappers = "".join(_wrapper(name, parameters, alone) for name, (_, parameters) in kernels(file).items())
    program = f'#include "{HEADER}"\n{text}\n{wrappers}'
    digest = hashlib.sha256((program + HEADER.read_text() + " ".join(FLAGS)).encode()).hexdigest()[:32]
    built = BUILT / f"{digest}.so"
    BUILT.mkdir(exist_ok=True)
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            (Path(folder) / f"{file}.cpp").write_text(program)
            made = Path(folder) / "kernels.so"
            done = subprocess.run(
                ["g++", *FLAGS, f"{folder}/{file}.cpp", "-o", str(made)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            made.replace(built)
    return ctypes.CDLL(str(built))
