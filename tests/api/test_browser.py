"""The pages in a browser: they follow the record without being loaded again, and break none of their own rules.

Screenshots of every page, wide and narrow, light and dark, are left in the tests' temporary folder.
"""

import shutil
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import uvicorn
import world
from record import Work, work

from api.app import create_app
from proof.attestation import sign_commitment
from prover import prove
from verifier.tables import ModelRow

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

PATIENCE = 15_000  # milliseconds that a browser is given for anything
INSTALL_SECONDS = 240
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
WATCH = "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.violatedDirective, e.blockedURI))"


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or _installed()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


def _installed():
    if shutil.which("apt-get"):
        command = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=INSTALL_SECONDS, check=False)
    return shutil.which("chromium") or pytest.skip("there is no chromium here, and apt-get cannot install it")


@pytest.fixture
def address(door):
    """A real server on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(create_app(door), port=0, log_level="error", lifespan="on"))
    socket = server.config.bind_socket()
    thread = Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def visit(chromium, address, token):
    """Opens a page that is signed in; nothing may be wrong on its console when the test ends."""
    said, contexts = [], []

    def opened(size="wide", scheme="light", script=True):
        width, height = SIZES[size]
        context = chromium.new_context(
            base_url=address,
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            java_script_enabled=script,
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        if script:
            page.add_init_script(WATCH)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto("/")
        page.get_by_label("API key").fill(token())
        page.get_by_role("button", name="Sign in").click()
        playwright.expect(page.get_by_role("heading", level=1)).to_have_text("Tasks")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def refused(record):
    def bent(trace):
        trace["layer1.softmax"] = np.roll(trace["layer1.softmax"], 1, -1)
        return trace

    return record.check(work(bent))


def sentences(record):
    """A task on the real MiniLM, of 309 nodes."""
    asked = replace(world.minilm(), nonce=bytes([9] * 32))
    committed = prove.commit(asked.model, asked.run(), asked.task)
    done = Work(asked, committed, sign_commitment(committed.commitment, asked.task.reward, asked.key))
    model = asked.model
    row = ModelRow(id=model.id.hex(), blob=record.keep(asked.source), size=1, report=model.report(), created=0.0)
    record.store.add_model(row)
    return record.check(done)


def test_a_task_is_followed_without_loading_the_page_again(visit, record):
    task = record.check(work())
    page = visit()
    page.evaluate("window.loaded = 'once'")
    row = page.locator(f"#task-{task}")
    playwright.expect(row).to_contain_text("checking")
    record.judge()
    playwright.expect(row).to_contain_text("attested")
    playwright.expect(row).to_contain_text("passed")
    playwright.expect(page.locator("#stage-attested")).to_contain_text("1")
    newer = record.post(work())
    playwright.expect(page.locator(f"#task-{newer}")).to_be_visible()
    assert page.evaluate("window.loaded") == "once"


def test_a_task_page_follows_its_task_to_the_end(visit, record):
    task = record.check(work())
    page = visit()
    page.locator(f"#to-{task}").click()
    playwright.expect(page.locator("#outcome")).to_contain_text("Checking")
    record.judge()
    playwright.expect(page.locator("#outcome")).to_contain_text("Passed")
    playwright.expect(page.locator("svg.graph")).to_be_visible()
    playwright.expect(page.locator("main[data-live]")).to_have_count(0)


def test_updates_can_be_stopped(visit, record):
    page = visit()
    button = page.locator("#live")
    button.click()
    playwright.expect(button).to_have_text("Paused")
    task = record.post(work())
    with page.expect_response("**/") as answer:  # the next look, after it was let go on
        button.click()
    assert answer.value.ok
    playwright.expect(page.locator(f"#task-{task}")).to_be_visible()


def test_what_is_open_and_focused_stays_so(visit, record):
    task = record.post(work())
    page = visit()
    page.locator(f"#to-{task}").focus()
    newer = record.post(work())
    playwright.expect(page.locator(f"#task-{newer}")).to_be_visible()
    playwright.expect(page.locator(f"#to-{task}")).to_be_focused()


def test_it_works_without_javascript(visit, record):
    task = record.check(work())
    record.judge()
    page = visit(script=False)
    page.locator(f"#to-{task}").click()
    playwright.expect(page.locator("#outcome")).to_contain_text("Passed")
    page.get_by_role("link", name="Workers").first.click()
    playwright.expect(page.get_by_role("heading", level=1)).to_have_text("Workers")
    page.get_by_role("button", name="Sign out").click()
    playwright.expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pages_fit_their_screens(visit, record, tmp_path, size, scheme):
    folder = Path(tmp_path) / "screens"
    folder.mkdir()
    tasks = {"refused": refused(record), "passed": sentences(record)}
    record.judge()
    record.clock.now += 75
    tasks["posted"] = record.post(work())
    record.check(work())
    worker = record.store.commitment(tasks["passed"]).worker
    page = visit(size, scheme)
    paths = {"tasks": "/", "nodes": "/nodes", "node": f"/nodes/{worker}"}
    for name, path in (paths | {name: f"/tasks/{task}" for name, task in tasks.items()}).items():
        page.goto(path)
        playwright.expect(page.get_by_role("heading", level=1)).to_be_visible()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= SIZES[size][0], f"{name} is {width} wide"
        page.screenshot(path=folder / f"{name}.png", full_page=True)
    page.get_by_role("button", name="Sign out").click()
    playwright.expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    page.screenshot(path=folder / "login.png", full_page=True)
