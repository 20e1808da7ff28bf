"""`device`: the host's, and the CUDA device where there is one; the same tests run on both."""

import pytest
from host_device import HostDevice

from gpu.device import select

CUDA = select("auto")


@pytest.fixture(params=["host", *(["cuda"] if CUDA else [])])
def device(request):
    return HostDevice() if request.param == "host" else CUDA
