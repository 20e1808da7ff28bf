"""Models of strangers are opened in a process of its own, which may crash or hang without taking anybody along."""

import os
import signal
import threading
import time

import pytest
import world

from proof.errors import Malformed
from verifier.blobs import Blobs
from verifier.inspector import Inspector

SHAPES = {"ids": (2, world.LENGTH)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("inspected")


@pytest.fixture(scope="module")
def inspector(place):
    opened = Inspector(Blobs(place).root)
    yield opened
    opened.close()


@pytest.fixture
def model(place):
    path = place / "model.onnx"
    path.write_bytes(world.small().source)
    return path


def processes(inspector):
    return [child._process for child in inspector._children if child._process]


def test_a_report_is_that_of_the_model(inspector, model):
    told = inspector.report(model)
    assert told.id == world.small().model.id.hex()
    assert told.report == world.small().model.report()
    assert told.files == ()


def test_a_plan_is_possible_or_says_why_not(inspector, model):
    inspector.plan(model, SHAPES, "standard")
    inspector.plan(model, SHAPES, "standard")
    with pytest.raises(Malformed, match="ids"):
        inspector.plan(model, {"ids": (2,)}, "standard")


def test_bytes_that_are_no_model_are_malformed(inspector, place):
    path = place / "none.onnx"
    for content in (b"", b"no model", os.urandom(1000)):
        path.write_bytes(content)
        with pytest.raises(Malformed):
            inspector.report(path)


def test_a_process_that_dies_takes_its_request_along_and_no_other(inspector, model):
    inspector.report(model)
    for process in processes(inspector):
        os.kill(process.pid, signal.SIGSTOP)
    found = []

    def ask():
        try:
            inspector.report(model)
        except Malformed as error:
            found.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.1)
    for process in processes(inspector):
        os.kill(process.pid, signal.SIGKILL)
    asking.join(20)
    assert len(found) == 1
    assert "crashed" in found[0]
    assert inspector.report(model).id == world.small().model.id.hex()


def test_a_process_that_died_idle_is_nobodys_fault(inspector, model):
    inspector.report(model)
    for process in processes(inspector):
        process.stdin.close()
        process.wait()
    assert inspector.report(model).id == world.small().model.id.hex()


def test_what_takes_too_long_is_ended(place, model):
    impatient = Inspector(place, opening=0.05)
    try:
        with pytest.raises(Malformed, match="took more than"):
            impatient.report(model)
        assert all(process.poll() is not None for process in processes(impatient))
    finally:
        impatient.close()


def test_the_process_ends_with_its_parent(place, model):
    short = Inspector(place)
    short.report(model)
    (process,) = processes(short)
    process.stdin.close()
    assert process.wait(10) == 0
    short.close()
