"""Laws of the page, driven in headless Chromium around an engine that says its prompt again."""

import os

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from jaxlab.data.sources import Document
from jaxlab.errors import JaxlabError
from tests.serving.browser import installed_browser
from tests.serving.fakes import KEY, SECONDS, TEXTS, FakeEngine, served

# No sandbox: the tests may run as root. The rest keeps the browser from calling home.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser():
    """The browser of this machine, or else the one that playwright has installed."""
    with sync_playwright() as playwright:
        path = installed_browser() or playwright.chromium.executable_path
        if not os.path.exists(path):
            pytest.fail("the tests of the page need a browser: make .venv/.browser", pytrace=False)
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def engine():
    return FakeEngine(context=200)


@pytest.fixture
def page(browser, engine, request):
    """The page, loaded; at the end nothing went wrong in it and nothing came from elsewhere.

    Its parameter has the limits of the server.
    """
    complaints, elsewhere = [], []
    with served(engine, **getattr(request, "param", {})) as (url, _):
        page = browser.new_page()
        page.set_default_timeout(1000 * SECONDS)
        expect.set_options(timeout=1000 * SECONDS)
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else 0)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda one: None if one.url.startswith(url) else elsewhere.append(one.url)
        )
        page.goto(url)
        expect(page.locator("#model")).to_have_text("echo, 3 references")
        yield page
        page.close()
    assert elsewhere == []
    # A refused request is told by the browser as well as by the page.
    refused = ("400 (Bad Request)", "401 (Unauthorized)", "502 (Bad Gateway)")
    assert [line for line in complaints if not any(one in line for one in refused)] == []


def ask(page: Page, prompt: str, **fields: str) -> None:
    """Fill the form and press its button; fields by their ids."""
    page.get_by_label("Text to continue").fill(prompt)
    for name, value in fields.items():
        page.locator(f"#{name.replace('_', '-')}").fill(value)
    page.get_by_role("button", name="Continue").click()


def test_references_are_shown_before_the_first_token_and_the_answer_streams_beside_them(
    page, engine
):
    engine.gate.clear()
    ask(page, "one two", max_tokens="3")
    references = page.locator("#references .reference")
    expect(references).to_have_count(len(TEXTS))
    expect(references.nth(1)).to_contain_text(TEXTS[1])
    expect(references.nth(1).locator("header")).to_have_text("source 1 · [1] · 0.500")
    expect(page.locator("#text")).to_have_text("")
    expect(page.get_by_role("button", name="Continue")).to_be_disabled()
    engine.gate.set()
    expect(page.locator("#answer")).to_have_text("one two one two one")
    expect(page.get_by_role("button", name="Continue")).to_be_enabled()


@pytest.mark.parametrize("memory", ["on", "off", "shuffled", "text"])
def test_the_mode_that_is_chosen_is_the_one_that_is_asked_for(page, engine, memory):
    page.get_by_label("Memory").select_option(memory)
    ask(page, "one two", max_tokens="2", temperature="0.5", stop="two")
    expect(page.get_by_role("button", name="Continue")).to_be_enabled()
    expect(page.locator("#text")).to_have_text(" one")
    (request,) = engine.requests
    assert (request.memory, request.max_tokens) == (memory, 2)
    assert (request.sampling.temperature, request.stop) == (0.5, ("two",))
    count = 0 if memory == "off" else len(TEXTS)
    expect(page.locator("#references .reference")).to_have_count(count)


def test_what_a_reference_or_an_answer_holds_is_never_markup(page):
    ask(page, "<b>x</b> <img>", max_tokens="4")
    expect(page.locator("#text")).to_have_text(" <b>x</b> <img> <b>x</b> <img>")
    expect(page.locator("#references .reference").nth(2)).to_contain_text(TEXTS[2])
    expect(page.locator("#answer b, #answer img, #references img")).to_have_count(0)


def test_another_question_starts_from_an_empty_page(page):
    ask(page, "one two", max_tokens="2")
    expect(page.locator("#text")).to_have_text(" one two")
    page.get_by_label("Memory").select_option("off")
    ask(page, "three", max_tokens="1")
    expect(page.locator("#answer")).to_have_text("three three")
    expect(page.locator("#references")).to_be_empty()


def test_stop_frees_the_row_and_the_form(page, engine):
    engine.gate.clear()
    ask(page, "one two", max_tokens="100")
    expect(page.locator("#references .reference")).to_have_count(len(TEXTS))
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Continue")).to_be_enabled()
    expect(page.get_by_role("alert")).to_have_text("")
    assert engine.wait_for(1).cancelled.wait(SECONDS)


def test_what_the_server_refuses_is_said_in_its_words(page, engine):
    ask(page, "one two", max_tokens="500")
    expect(page.get_by_role("alert")).to_have_text("the prompt has 2 tokens: shorten it")
    expect(page.get_by_role("button", name="Continue")).to_be_enabled()
    assert engine.requests == []


@pytest.mark.parametrize("page", [{"api_key": KEY, "require_key": True}], indirect=True)
def test_the_key_is_sent_where_one_is_asked_for_and_nowhere_kept(page):
    ask(page, "one two", max_tokens="2")
    expect(page.get_by_role("alert")).to_contain_text("the key is missing")
    ask(page, "one two", key=KEY)
    expect(page.locator("#text")).to_have_text(" one two")
    page.reload()
    expect(page.get_by_label("Key")).to_have_value("")
    assert (
        page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    )


def test_an_answer_that_breaks_off_says_why(page, engine):
    engine.broken = JaxlabError("the device is gone")
    ask(page, "one two", max_tokens="5")
    expect(page.get_by_role("alert")).to_contain_text("the server failed")
    expect(page.get_by_role("button", name="Continue")).to_be_enabled()


def test_what_a_proxy_says_in_place_of_the_server_is_shown_and_the_next_try_is_whole(page):
    bad = {"status": 502, "content_type": "text/html", "body": "<b>no upstream</b>"}
    alert = page.get_by_role("alert")
    page.route("**/v1/completions", lambda route: route.fulfill(**bad))
    ask(page, "one two", max_tokens="2")
    expect(alert).to_have_text("status 502: <b>no upstream</b>")
    page.route("**/health", lambda route: route.fulfill(**bad))
    page.reload()
    expect(alert).to_contain_text("cannot be asked what it serves: status 502: <b>no upstream</b>")
    ask(page, "one two", max_tokens="2")
    expect(alert).to_contain_text("cannot be asked what it serves")  # and not: no model ""
    page.unroute("**/health")
    page.unroute("**/v1/completions")
    ask(page, "one two", max_tokens="2")
    expect(page.locator("#text")).to_have_text(" one two")
    expect(page.locator("#model")).to_have_text("echo, 3 references")
    expect(alert).to_have_text("")


def test_an_answer_that_is_cut_off_does_not_look_whole(page):
    piece = 'data: {"choices": [{"text": " one"}]}\n\n'
    sent = {"status": 200, "content_type": "text/event-stream"}
    page.route("**/v1/completions", lambda route: route.fulfill(**sent, body=piece))
    ask(page, "one two", max_tokens="2")
    expect(page.locator("#text")).to_have_text(" one")
    expect(page.get_by_role("alert")).to_contain_text("cut off")


def test_the_count_of_references_is_that_after_the_last_answer(page, engine):
    engine.reader.add([Document("new", "Snow falls.")])
    ask(page, "one two", max_tokens="2")
    expect(page.locator("#model")).to_have_text("echo, 4 references")
