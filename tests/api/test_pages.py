"""The pages: who sees what, that nothing of a model or a caller becomes markup, what they say without JavaScript."""

import re
import secrets
from dataclasses import replace
from html import unescape

import numpy as np
import onnx
import pytest
import record as records
import world
from record import Work, work

from api import pictures, typesetting
from api.caller import COOKIE
from api.pages import LISTED
from proof.attestation import sign_commitment
from proof.sampling import drawn
from prover import prove
from verifier.summaries import Filter
from verifier.tables import ModelRow

WORKER = world.small().prove(world.small().run()).commitment.worker
ORIGIN = {"Origin": "http://testserver"}
LIE = "layer1.softmax"


@pytest.fixture
def pages(anonymous, token):
    """A browser of the tenant whose tasks the record posts."""
    return signed_in(anonymous, token())


def signed_in(client, key):
    client.cookies.clear()
    answer = client.post("/login", data={"key": key}, headers=ORIGIN)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    return client


def bent(trace):
    trace[LIE] = np.roll(trace[LIE], 1, -1)
    return trace


def text(answer):
    """What a reader sees."""
    assert answer.status_code == 200, answer.text[:500]
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", answer.text)))


# ---- who sees what


@pytest.mark.parametrize("path", ["/", "/nodes", f"/nodes/{WORKER}", f"/tasks/{'0' * 64}", "/?stage=posted"])
def test_a_stranger_is_asked_to_sign_in(anonymous, path):
    for key in (None, "assay_" + "0" * 16 + "_" + "A" * 43, "nonsense", "assay_é"):
        headers = {} if key is None else {"Cookie": f"{COOKIE}={key}".encode()}
        answer = anonymous.get(path, headers=headers)
        assert (answer.status_code, answer.headers["location"], answer.text) == (303, "/login", "")


def test_an_api_key_in_a_header_opens_no_page_and_a_cookie_no_route(api, token):
    assert api.get("/").status_code == 303
    del api.headers["Authorization"]
    assert signed_in(api, token()).get("/v1/tasks").status_code == 401


def test_the_cookie_is_for_this_site_alone(anonymous, token):
    key = token()
    answer = anonymous.post("/login", data={"key": f" {key} "}, headers=ORIGIN)
    name, *attributes = answer.headers["set-cookie"].split("; ")
    assert name == f"{COOKIE}={key}"
    assert {entry.lower() for entry in attributes} == {"httponly", "samesite=strict", "path=/"}
    over_tls = anonymous.post("https://testserver/login", data={"key": key}, headers={"Origin": "https://testserver"})
    assert "secure" in over_tls.headers["set-cookie"].lower()


@pytest.mark.parametrize("key", ["", "nonsense", "assay_" + "0" * 16 + "_" + "A" * 43, "<script>alert(1)</script>"])
def test_a_wrong_key_is_told_and_not_kept(anonymous, key):
    answer = anonymous.post("/login", data={"key": key}, headers=ORIGIN)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert "This key is not known here" in answer.text
    assert "alert(1)" not in answer.text


def test_a_key_that_may_not_see_tasks_is_refused(anonymous, token):
    answer = anonymous.post("/login", data={"key": token("acme", "metrics")}, headers=ORIGIN)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}]
)
@pytest.mark.parametrize("path", ["/login", "/logout"])
def test_another_site_sends_no_form(pages, token, path, headers):
    answer = pages.post(path, data={"key": token()}, headers=headers)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_a_form_is_bounded(anonymous):
    assert anonymous.post("/login", data={"key": "a" * 5000}, headers=ORIGIN).status_code == 413


def test_signing_out_forgets_the_key(pages):
    answer = pages.post("/logout", headers=ORIGIN)
    assert answer.headers["location"] == "/login"
    assert COOKIE not in pages.cookies
    assert pages.get("/").status_code == 303


def test_a_tenant_sees_its_own_tasks_and_an_administrator_all(anonymous, record, token):
    task = record.check(work())
    record.judge()
    for key, seen in ((token(), True), (token("umbrella"), False), (token("umbrella", "admin"), True)):
        browser = signed_in(anonymous, key)
        front, node = browser.get("/"), browser.get(f"/nodes/{WORKER}")
        assert browser.get(f"/tasks/{task}").status_code == (200 if seen else 404)
        assert (task in front.text) == (task in node.text) == seen
        assert ("1 passed" in text(front)) == seen
        assert "Passed 1 Refused 0" in text(node)  # a worker's record is everybody's


# ---- what no value may do


def test_nothing_of_a_model_becomes_markup(pages, record):
    evil = '<script>alert("1")</script>'
    source = onnx.load_from_string(world.gpt_bytes())
    for node in source.graph.node:
        if node.name == "logits":
            node.name = evil
    asked = replace(world.of(source.SerializeToString(), world.small().inputs), nonce=secrets.token_bytes(32))
    trace = asked.run()
    trace["logits"] = trace["logits"] + 1
    page = pages.get(f"/tasks/{judged(record, asked, trace)}")
    assert evil not in page.text
    assert "<script>" not in page.text
    assert text(page).count(evil) >= 3  # in the outcome, the picture and the table


def test_every_page_forbids_what_it_does_not_need(pages, record):
    task = record.check(work())
    for path in ("/", "/login", "/nodes", f"/tasks/{task}", "/tasks/none", "/static/style.css", "/static/none"):
        answer = pages.get(path)
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'self'"
        assert {policy[name] for name in ("object-src", "base-uri", "frame-ancestors")} == {"'none'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=\"/static/)|(?:src|href)=\"(?!/|#)", answer.text)
        if not path.startswith("/static/style"):
            assert answer.headers["cache-control"] == "no-store"


# ---- what they say


def test_the_front_page_counts_and_lists(pages, record):
    tasks = [record.post(work()), record.check(work(bent)), record.check(work())]
    record.judge()
    page = pages.get("/")
    assert all(task in page.text for task in tasks)
    said = text(page)
    assert "3 tasks, 2 were judged: 1 passed , 1 refused" in said
    assert "posted 1 challenged 0 checking 0 accepted 0 rejected 0 attested 2" in said
    assert "refused: reexecution 1" in said
    only = pages.get("/?stage=posted").text
    assert tasks[0] in only
    assert tasks[1] not in only


def test_a_page_leads_on_to_older_tasks(pages, record):
    made = []
    for _ in range(LISTED + 3):
        made.append(record.post(work()))
        record.clock.now += 1
    first = pages.get("/")
    shown = re.findall(r'id="task-([0-9a-f]{64})"', first.text)
    assert shown == made[:2:-1]
    older = re.search(r'rel="next" href="([^"]+)"', first.text)[1]
    second = pages.get(unescape(older))
    assert re.findall(r'id="task-([0-9a-f]{64})"', second.text) == made[2::-1]
    assert 'rel="next"' not in second.text


@pytest.mark.parametrize(
    "query", ["stage=none", "before=x", "before=1_2", "before=nan_" + "0" * 64, "before=" + "9" * 200]
)
def test_a_query_that_means_nothing_is_a_page_too(pages, query):
    answer = pages.get(f"/?{query}")
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"].startswith("text/html")


def test_a_task_that_passed_shows_its_check(pages, record):
    done = work()
    task = record.check(done)
    record.clock.now += 5
    record.judge()
    page = pages.get(f"/tasks/{task}")
    said = text(page)
    total = len(done.asked.model.nodes)
    assert f"All {total} nodes of the graph were checked" in said
    assert page.text.count('<g class="how-') == total
    assert page.text.index("posted</b>") < page.text.index("checking</b>") < page.text.index("attested</b>")
    assert "after 5 s" in said
    verdict, bound = record.store.verdict(task).document, record.store.commitment(task)
    signed = record.store.attestation_of(task)
    for part in (
        bound.worker,
        bound.digest,
        bound.challenge["seed"],
        verdict["check_seed"],
        signed.uid,
        "0x" + "9a" * 20,
    ):
        assert part in said
    for family, largest in verdict["largest"].items():
        assert re.search(rf"{family} \d+ [\d ]+ {re.escape(typesetting.ratio(largest))} ", said)
    rows = drawn(bytes.fromhex(bound.challenge["seed"]), 16, 96)
    assert f"{len(rows)} of 96" in said
    assert ", ".join(map(str, rows)) in said
    assert "data-live" not in page.text  # nothing more will come


def test_a_task_that_was_refused_says_where_and_why(pages, record):
    task = record.check(work(bent))
    record.judge()
    page = pages.get(f"/tasks/{task}")
    verdict = record.store.verdict(task).document
    assert verdict["node"] == LIE
    for part in ("Refused: reexecution", "A row computed again gives another result.", verdict["detail"]):
        assert part in text(page)
    assert page.text.count('<g class="how-refused"') == 1
    assert "Says fail, pays 0" in text(page)


def test_a_task_in_work_shows_what_there_is(pages, record):
    done = work()
    posted = record.post(done)
    assert "whoever is first" in text(pages.get(f"/tasks/{posted}"))
    checking = record.check(work())
    page = pages.get(f"/tasks/{checking}")
    assert "data-live" in page.text
    assert "The proof is being checked." in text(page)
    assert record.store.proof(checking).check_seed not in page.text


def test_a_deadline_that_passed_is_told(pages, record):
    done = work()
    task = record.post(done)
    record.store.commit(done.signed, record.clock())
    record.clock.now = done.asked.task.deadline + 1.0
    record.store.lapse(record.clock())
    record.judge()
    assert "Expired That the deadline passed is signed." in text(pages.get(f"/tasks/{task}"))
    assert "Passed 0 Refused 0 Expired 1 Challenges answered 0 % 0 of 1" in said_of_worker(pages)


def said_of_worker(pages):
    return text(pages.get(f"/nodes/{WORKER}"))


def test_an_unchanged_page_is_not_sent_again(pages, record):
    record.post(work())
    tag = pages.get("/").headers["etag"]
    again = pages.get("/", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    record.post(work())
    assert pages.get("/", headers={"If-None-Match": tag}).status_code == 200


# ---- workers


def test_a_worker_has_a_page_for_everybody(pages, record, token):
    for bend in (None, None, bent):
        record.check(work(bend))
    record.judge()
    for tenant in (records.TENANT, "umbrella"):
        browser = signed_in(pages, token(tenant))
        said = said_of_worker(browser)
        assert "Passed 2 Refused 1 Expired 0 Challenges answered 100 % 3 of 3" in said
        assert f"{2 * world.REWARD.amount:,}".replace(",", " ") in said
        assert WORKER in browser.get("/nodes").text
    assert "None of its tasks is yours." in said


def test_a_worker_without_a_record_has_no_page(pages):
    assert pages.get("/nodes/0x" + "00" * 20).status_code == 404
    assert pages.get("/nodes/0xABC").status_code == 404


# ---- the picture


def seen(name, ratio=None, how="checked", family="pointwise"):
    return {"name": name, "op": "Add", "family": family, "how": how, "entries": 1, "determined": 0, "ratio": ratio}


def test_a_bar_is_as_high_as_its_ratio_on_a_logarithmic_scale():
    drawn = pictures.picture(
        [seen("a", 1.0), seen("b", 0.1), seen("c", 0.01), seen("d", 0.0), seen("e", how="refused")]
    )
    tops = [bar.y for bar in drawn.bars]
    assert tops[0] == drawn.threshold == drawn.decades[0][0]
    assert tops[1] == drawn.threshold + pictures.PLOT_HEIGHT / 2
    assert tops[2] == tops[3] == drawn.floor - pictures.STUB
    assert tops[4] == 0.0
    assert all(bar.y + bar.height == drawn.floor for bar in drawn.bars)


def test_a_graph_of_many_nodes_has_readable_columns_with_the_worst_of_each():
    many = [seen(f"model.layers.{i // 100}.n{i}", 0.001) for i in range(5000)]
    many[1234]["ratio"] = 0.9
    many[4321]["how"] = "refused"
    drawn = pictures.picture(many)
    assert len(drawn.bars) <= pictures.MAX_COLUMNS
    assert min(bar.width for bar in drawn.bars) >= 1
    assert max(bar.x + bar.width for bar in drawn.bars) <= drawn.width
    assert sum("n1234 (Add), checked: 0.9 " in bar.words for bar in drawn.bars) == 1
    assert [bar.how for bar in drawn.bars].count("refused") == 1
    assert len(drawn.bands) == 50
    table = pictures.largest(many)
    assert [node["name"].rpartition(".")[2] for node in table[:2]] == ["n4321", "n1234"]
    assert len(table) == pictures.LARGEST


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layer0.softmax", "0"),
        ("/encoder/layer.11/attention/MatMul", "11"),
        ("model.layers.3.mlp", "3"),
        ("h.7.attn", "7"),
        ("node_MatMul_123", None),
        ("layernorm2.x", None),
    ],
)
def test_layers_are_found_by_their_names(name, layer):
    bands = pictures.picture([seen(name)]).bands
    assert [band.label for band in bands] == ([] if layer is None else [layer])


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (1, "100 %"), (0.185, "18.5 %"), (1e-7, "10⁻⁷"), (0.99999, "99.99 %")]
)
def test_a_chance_is_never_shown_as_less_than_it_is_certain(value, shown):
    assert typesetting.chance(value).replace("\u00a0", " ") == shown


def judged(record, asked, trace):
    """The id of a task on a model of its own, with its verdict."""
    done = Work(asked, committed := prove.commit(asked.model, trace, asked.task), None)
    done.signed = sign_commitment(committed.commitment, asked.task.reward, asked.key)
    blob = record.keep(asked.source)
    record.store.add_model(
        ModelRow(id=asked.model.id.hex(), blob=blob, size=1, report=asked.model.report(), created=0.0)
    )
    task = record.check(done)
    record.judge()
    assert record.store.tasks(1, Filter(newest=True))[0].verdict
    return task
