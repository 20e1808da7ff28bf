"""Two deployments that the scenarios share: each leaves them whole, which the audit at its end shows."""

import time

import pytest

from tests.faults.kit import Crowd, Deployment


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    yield from deployed(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="session")
def production(tmp_path_factory):
    yield from deployed(tmp_path_factory.mktemp("production"), production=True)


@pytest.fixture(params=["embedded", "production"])
def deployment(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def crowd(deployment):
    with Crowd(deployment) as many:
        yield many


def deployed(folder, **options):
    one = Deployment(folder, **options)
    try:
        one.start()
        with Crowd(one) as crowd:
            crowd.register()
        yield one
    finally:
        one.stop()


@pytest.fixture
def tell(capsys):
    """Writes a line about a scenario, and how long it took, that is seen although it passes."""
    started = time.monotonic()

    def told(line):
        with capsys.disabled():
            print(f"\n    {line}: {time.monotonic() - started:.1f} s", end=" ")  # noqa: T201

    return told
