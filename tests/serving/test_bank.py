"""Laws of a served bank that is asked much at once, and changed meanwhile."""

import contextlib
import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from jaxlab.errors import ConfigError, RewrittenError
from jaxlab.inference.engine import Engine
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.store import Bank
from tests.inference.small import letters, losing_reader, small_bank, small_model
from tests.serving.fakes import BODY, KEY, SECONDS, TEXTS, FakeEngine, said, served, until

SEARCH = ("/memory/search", {"query": "fox"})
ADD = ("/memory/add", {"references": [{"text": "Snow falls.", "source": "s"}]})


@pytest.mark.parametrize(
    ("slow", "call", "other", "taken"),
    [("search", SEARCH, ADD, 3), ("add", ADD, SEARCH, 2)],
    ids=["search", "add"],
)
def test_calls_that_the_bank_is_slow_with_are_bounded_and_keep_nothing_else_waiting(
    slow, call, other, taken
):
    """As many searches at once as there are rows, one that adds, and one of each that waits."""
    engine, may_go = FakeEngine(), threading.Event()
    work = getattr(engine.reader, slow)

    def slowly(*args, **options):
        assert may_go.wait(SECONDS)
        return work(*args, **options)

    setattr(engine.reader, slow, slowly)
    with (
        served(engine, api_key=KEY, max_waiting=1) as (url, _),
        httpx.Client(base_url=url, timeout=SECONDS) as http,
        ThreadPoolExecutor(60) as clients,
    ):

        def ask(path, body):
            return http.post(path, json=body, headers={"Authorization": f"Bearer {KEY}"})

        try:
            asked = [clients.submit(ask, *call) for _ in range(60)]
            until(lambda: sum(one.done() for one in asked) == 60 - taken)
            assert ask("/v1/completions", BODY).status_code == 200
            assert ask(*other).status_code == 200
        finally:
            may_go.set()
        answers = [one.result() for one in asked]
        refused = [one for one in answers if one.status_code == 429]
        assert len(refused) == 60 - taken and refused[0].headers["Retry-After"] == "1"
        assert said(refused[0])["type"] == "rate_limit_error"
        assert sum(one.status_code == 200 for one in answers) == taken
        assert ask(*call).status_code == 200


def test_requests_that_are_slow_to_encode_keep_no_search_waiting():
    engine = FakeEngine()
    may_go, encode = threading.Event(), engine.encode
    engine.encode = lambda request: may_go.wait(SECONDS) and encode(request)
    with served(engine, max_waiting=60) as (url, app), ThreadPoolExecutor(50) as clients:
        ask = functools.partial(httpx.post, timeout=SECONDS)
        try:
            asked = [clients.submit(ask, f"{url}/v1/completions", json=BODY) for _ in range(50)]
            until(lambda: app.state.server.runner.under_way >= 40)  # as many as anyio has threads
            assert httpx.post(f"{url}/memory/search", json={"query": "fox"}).status_code == 200
        finally:
            may_go.set()
        assert {one.result().status_code for one in asked} == {200}


def test_what_others_do_to_the_bank_is_taken_over_or_told(caplog):
    engine = FakeEngine()
    reader = engine.reader
    with (
        served(engine, api_key=KEY, reload_seconds=0.01) as (url, _),
        httpx.Client(base_url=url, timeout=SECONDS) as http,
    ):
        reader.broken = "it cannot be reached"
        until(lambda: "it cannot be reached" in caplog.text)
        assert http.get("/health").status_code == 200  # it may be there the next time
        reader.broken, reader.deleted = None, {TEXTS[0]}
        until(lambda: http.get("/health").json()["references"] == 2)
        found = http.post("/memory/search", json={"query": "fox"}).json()["references"]
        assert [one["text"] for one in found] == TEXTS[1:]
        engine.submit, submit = lambda *_: reader.refresh(), engine.submit
        reader.rewritten = True
        response = http.post("/v1/completions", json=BODY)  # before it has looked again, or after
        assert response.status_code == 503 and "start the server" in said(response)["message"]
        engine.submit = submit
        until(lambda: http.get("/health").status_code == 503)
        assert "start the server again" in http.get("/health").json()["reason"]
        key = {"Authorization": f"Bearer {KEY}"}
        for path, body in (
            ("/v1/completions", BODY),
            ("/v1/completions", BODY | {"memory": "text"}),
            ("/memory/search", {"query": "fox"}),
            ("/memory/add", {"references": [{"text": "a", "source": "b"}]}),
        ):
            response = http.post(path, json=body, headers=key)
            assert response.status_code == 503
            assert "start the server again" in said(response)["message"]
        response = http.post("/v1/completions", json=BODY | {"memory": "off"})
        assert response.status_code == 200
    assert caplog.text.count("it cannot be reached") == 1


def test_a_server_that_is_told_to_looks_at_its_bank_never_again():
    engine = FakeEngine()
    engine.reader.rewritten = True
    with served(engine, reload_seconds=0.0) as (url, app):
        assert httpx.get(f"{url}/health").status_code == 200
        assert app.state.server.watch.problem is None


def test_what_was_deleted_before_it_was_read_is_searched_for_again(tmp_path):
    engine = FakeEngine()
    engine.reader = losing_reader(small_bank(tmp_path))
    with served(engine) as (url, _), httpx.Client(base_url=url, timeout=SECONDS) as http:
        body = {"query": "aaab", "top": 2}
        found = http.post("/memory/search", json=body)
        assert found.status_code == 200 and len(found.json()["references"]) == 2
        assert http.post("/memory/search", json=body).json() == found.json()


def test_a_bank_that_was_repaired_meanwhile_is_no_bank_that_was_rewritten(tmp_path, first):
    """Whoever ran into it may try again; the others do not hear of it."""
    bank = small_bank(tmp_path)

    def adding(documents):
        if not asked:
            asked.append(documents)
            raise RewrittenError("a shard was made again")
        return range(8, 9)

    asked = []
    reader = MemoryReader.open(bank, model_embed=letters, append=adding)
    engine = Engine(small_model(), reader, rows=1, like=first)
    engine.start()
    with (
        contextlib.closing(engine),
        served(engine, api_key=KEY, reload_seconds=0.0) as (url, _),
        httpx.Client(base_url=url, timeout=SECONDS) as http,
    ):
        headers, (path, body) = {"Authorization": f"Bearer {KEY}"}, ADD
        response = http.post(path, json=body, headers=headers)
        assert (response.status_code, said(response)["message"]) == (
            503,
            "the bank was changed meanwhile: try again",
        )
        assert http.get("/health").status_code == 200
        assert http.post(path, json=body, headers=headers).status_code == 200


def test_what_the_server_lacks_is_no_fault_of_the_request(tmp_path, first):
    """Though the error would be the user's on a command line, and names a path."""

    def lacking(*_, **__):
        raise ConfigError("embedder /home/x: no such directory")

    reader = MemoryReader.open(small_bank(tmp_path), model_embed=letters)
    reader.search = lacking
    engine = Engine(small_model(), reader, rows=1, like=first)
    engine.start()
    with (
        contextlib.closing(engine),
        served(engine) as (url, _),
        httpx.Client(base_url=url, timeout=SECONDS) as http,
    ):
        body = {"model": "small", "prompt": "aaab", "max_tokens": 2}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 500 and "/home" not in response.text


@pytest.fixture(scope="module")
def first():
    """An engine whose programs others share."""
    return Engine(small_model(), use_preface=True, rows=1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "small", "prompt": "aaab", "max_tokens": 2}),
        ("/v1/completions", {"model": "small", "prompt": "a", "max_tokens": 2, "stream": True}),
        SEARCH,
        ADD,
    ],
    ids=["whole", "stream", "search", "add"],
)
def test_who_first_runs_into_a_compacted_bank_is_told_and_all_others_from_then_on(
    tmp_path, first, path, body
):
    bank = small_bank(tmp_path)
    reader = MemoryReader.open(bank, model_embed=letters, append=lambda documents: range(0))
    engine = Engine(small_model(), reader, rows=1, like=first)
    other = Bank.open(bank.url, write=True)
    other.delete(rows=[0])
    other.compact()
    engine.start()
    told = "the bank was rewritten (compacted or repaired): start the server again"
    with (
        contextlib.closing(engine),
        served(engine, api_key=KEY, reload_seconds=0.0) as (url, _),
        httpx.Client(base_url=url, timeout=SECONDS) as http,
    ):

        def ask(path, body):
            return http.post(path, json=body, headers={"Authorization": f"Bearer {KEY}"})

        assert http.get("/health").status_code == 200  # nobody has looked
        response = ask(path, body)
        if "stream" in body:
            *_, error, done, _ = response.text.split("\n\n")
            assert json.loads(error.removeprefix("data: "))["error"]["message"] == told
            assert (response.status_code, done) == (200, "data: [DONE]")
        else:
            assert (response.status_code, said(response)["message"]) == (503, told)
        health = http.get("/health")
        assert (health.status_code, health.json()["reason"]) == (503, told)
        silent = {"model": "small", "prompt": "aaab", "max_tokens": 2}
        for path, body in (SEARCH, ADD, ("/v1/completions", silent | {"stream": True})):
            response = ask(path, body)
            assert (response.status_code, said(response)["message"]) == (503, told)
        assert ask("/v1/completions", silent | {"memory": "off"}).status_code == 200
