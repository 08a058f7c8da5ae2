"""Laws of the server itself: the bank, limits, clients that go, going down, figures."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxlab.errors import BankError, ClosedError, ConfigError
from jaxlab.inference.engine import Engine
from jaxlab.serving.metrics import HELP
from jaxlab.serving.settings import KEY_VARIABLE, Settings, hosts_of
from tests.inference.small import small_bank, small_model, small_reader
from tests.serving.fakes import BODY, KEY, SECONDS, TEXTS, FakeEngine, said, served, until


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def server(engine):
    with (
        served(engine, api_key=KEY, body_bytes=2000, max_waiting=1) as (url, app),
        httpx.Client(base_url=url, timeout=SECONDS) as http,
    ):
        yield http, app.state.server


def http_request(body) -> bytes:
    """A request for a completion, as bytes."""
    content = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
    )


def test_the_bank_is_searched(server):
    http, _ = server
    found = http.post("/memory/search", json={"query": "fox", "top": 2}).json()["references"]
    assert [one["text"] for one in found] == TEXTS[:2]
    assert found[0] == {"reference": 0, "score": 1.0, "source": "source 0", "text": TEXTS[0]}
    body = {"query": "fox", "sources": ["source 2"]}
    found = http.post("/memory/search", json=body).json()["references"]
    assert [one["reference"] for one in found] == [2]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["source 2", "source 9"], "the bank has no references of source 9: name a source as a "
         "search names it, such as source 0"),
        ([], "sources: List should have at least 1 item after validation, not 0"),
    ],
)  # fmt: skip
def test_a_search_among_no_references_is_refused_as_by_the_command(server, sources, message):
    http, _ = server
    response = http.post("/memory/search", json={"query": "fox", "sources": sources})
    assert response.status_code == 400
    assert (said(response)["message"], said(response)["param"]) == (message, "sources")


def test_a_misspelt_field_is_not_a_wider_search_or_a_half_told_reference(server):
    http, _ = server
    response = http.post("/memory/search", json={"query": "fox", "source": "source 2"})
    assert response.status_code == 400 and "'source' is not a field" in said(response)["message"]
    body = {"references": [{"text": "a", "source": "b", "title": "c"}]}
    response = http.post("/memory/add", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 400
    assert "references.0: 'title' is not a field" in said(response)["message"]


def test_only_the_key_adds_to_the_bank_and_what_is_added_is_found(server, engine):
    http, _ = server
    body = {"references": [{"text": "Snow falls.", "source": "../../etc"}]}
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY[:-1]}):
        assert http.post("/memory/add", json=body, headers=headers).status_code == 401
    assert len(engine.reader) == 3
    allowed = {"Authorization": f"Bearer {KEY}"}
    done = http.post("/memory/add", json=body, headers=allowed).json()
    assert done == {"added": [3], "references": 4}
    found = http.post("/memory/search", json={"query": "snow"}).json()["references"]
    assert found[3]["source"] == "../../etc"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/memory/search", {"query": "fox"}),
        ("/memory/add", {"references": [{"text": "Snow falls.", "source": "s"}]}),
    ],
)
def test_a_bank_that_cannot_is_the_fault_of_the_server(server, engine, caplog, path, body):
    http, _ = server
    engine.reader.broken = "bank b: cannot write x (the disk is full); make room"
    response = http.post(path, json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 500 and said(response)["type"] == "server_error"
    assert "bank could not be read or written" in said(response)["message"]
    assert "disk" not in response.text and "the disk is full" in caplog.text


@pytest.mark.parametrize("key", ["schlüssel", "a\n", " a"])
def test_a_key_that_no_header_carries_is_one_clear_error(monkeypatch, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match="JAXLAB_API_KEY cannot be sent"):
        Settings.from_environment()


def test_where_a_key_is_required_all_is_closed_but_what_tells_nothing(engine):
    with (
        served(engine, api_key=KEY, require_key=True) as (url, app),
        httpx.Client(base_url=url, timeout=SECONDS) as http,
    ):
        bodies = {
            "/v1/completions": BODY,
            "/v1/chat/completions": {
                "model": "echo",
                "messages": [{"role": "user", "content": ""}],
            },
            "/memory/search": {"query": "fox"},
            "/memory/add": {"references": [{"text": "a", "source": "b"}]},
        }
        paths = {*app.openapi()["paths"], "/openapi.json"}
        found = {
            path: http.post(path, json=bodies[path]) if path in bodies else http.get(path)
            for path in paths
        }
    still_open = {path for path, response in found.items() if response.status_code == 200}
    assert still_open == {"/", "/health", "/metrics", "/openapi.json"}
    assert {found[path].status_code for path in paths - still_open} == {401}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("127.0.0.2", 200),
        ("127.0.0.3", 421),
        ("pages.example", 421),
        ("localhost.pages.example:8000", 421),
        ("pages.example:localhost", 421),
        ("[::2]", 421),
        ("", 421),
    ],
)
def test_a_page_from_elsewhere_cannot_ask_a_server_of_this_machine(engine, host, status):
    with served(engine, hosts=hosts_of("127.0.0.2")) as (url, _):
        response = httpx.post(f"{url}/memory/search", json={"query": "a"}, headers={"Host": host})
    assert response.status_code == status
    assert status == 200 or "Host" in said(response)["message"]


def test_a_server_at_an_address_of_the_net_has_any_name():
    assert [hosts_of(one) for one in ("0.0.0.0", "::", "10.0.0.7", "box")] == [None] * 4
    assert "[::1]" in hosts_of("::1") and "127.0.0.1" in hosts_of("localhost")


def test_without_a_key_nobody_adds(engine):
    with served(engine) as (url, _):
        body = {"references": [{"text": "a", "source": "b"}]}
        response = httpx.post(f"{url}/memory/add", json=body)
    assert response.status_code == 403 and "JAXLAB_API_KEY" in said(response)["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "not JSON"),
        (b"\xff\xfe", "application/json", 400, ""),
        (b"[]", "application/json", 400, "the body"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "has to be JSON"),
        (json.dumps(BODY).encode(), "text/plain", 415, "has to be JSON"),
        (b'{"model":"echo","prompt":"","temperature":NaN}', "application/json", 400, "temperature"),
        (b'{"model":"echo","prompt":"a","top_p":Infinity}', "application/json", 400, "top_p"),
        (b'{"model":"echo","prompt":"\\ud800"}', "application/json", 400, "half of a surrogate"),
        (b'{"model":"\\ud800","prompt":"a"}', "application/json", 400, "half of a surrogate"),
        (b'{"model":"echo","prompt":"a","\\ud800":1}', "application/json", 400, ""),
        (b'{"model":"echo","prompt":"a","seed":1e99}', "application/json", 400, "seed"),
        (b'{"model":"echo","prompt":["a","b"]}', "application/json", 400, "a prompt is text"),
        (b'{"model":"echo","prompt":5}', "application/json", 400, "a prompt is text"),
        (b'{"model":"echo","prompt":"","stop":["a",""]}', "application/json", 400, "stop.1: Str"),
        (b'{"model":"echo","prompt":"","stop":[1,2,3,4,5]}', "application/json", 400, "stop: List"),
        (b"[" * 1000, "application/json", 400, ""),
        (json.dumps({"prompt": "x" * 3000}).encode(), "application/json", 413, "2,000 bytes"),
    ],
)  # fmt: skip
def test_a_bad_body_is_told_what_is_wrong_with_it(server, content, kind, status, message):
    http, _ = server
    response = http.post("/v1/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == status
    assert message in said(response)["message"]


def test_a_body_without_a_length_is_cut_off_all_the_same(server):
    http, _ = server
    headers = {"Content-Type": "application/json"}
    pieces = (b" " * 500 for _ in range(100_000))
    response = http.post("/v1/completions", content=pieces, headers=headers)
    assert response.status_code == 413


def test_what_is_not_there_is_said_in_the_same_form(server):
    http, _ = server
    assert said(http.get("/nowhere"))["type"] == "invalid_request_error"
    assert http.get("/nowhere").status_code == 404
    assert http.get("/v1/completions").status_code == 405 and said(http.get("/v1/completions"))
    for path in ("/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/../../etc/passwd"):
        assert http.get(path).status_code == 404


def test_too_many_who_wait_are_turned_away(server, engine):
    http, _ = server
    engine.gate.clear()
    with httpx.Client(base_url=http.base_url, timeout=SECONDS) as others:
        streams = [others.stream("POST", "/v1/completions", json=BODY | {"stream": True})
                   for _ in range(3)]  # fmt: skip
        for stream in streams:
            stream.__enter__()
        response = http.post("/v1/completions", json=BODY)
        assert response.status_code == 429 and response.headers["Retry-After"] == "1"
        assert said(response)["type"] == "rate_limit_error"
        engine.gate.set()
        for stream in streams:
            stream.__exit__(None, None, None)
    until(lambda: engine.running == 0)
    assert http.post("/v1/completions", json=BODY).status_code == 200


def test_no_more_are_let_in_when_many_come_at_once(server, engine):
    http, _ = server
    engine.gate.clear()
    all_came, encode = threading.Event(), engine.encode

    def slow_encode(request):
        all_came.wait(SECONDS)
        return encode(request)

    engine.encode = slow_encode
    with ThreadPoolExecutor(20) as clients:
        asked = [clients.submit(http.post, "/v1/completions", json=BODY) for _ in range(20)]
        until(lambda: sum(one.done() for one in asked) == 17)
        all_came.set()
        engine.gate.set()
        found = sorted(one.result().status_code for one in asked)
    assert found == [200] * 3 + [429] * 17  # two rows, and one that waits
    assert len(engine.tickets) == 3


def test_a_request_that_comes_while_the_engine_closes_is_told_so(server, engine):
    http, _ = server

    def closing(*_):
        raise ClosedError("the engine takes no more requests: it is being closed")

    engine.submit = closing
    response = http.post("/v1/completions", json=BODY)
    assert response.status_code == 503 and "no more requests" in said(response)["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(server, engine, stream):
    http, _ = server
    engine.gate.clear()
    with socket.create_connection((http.base_url.host, http.base_url.port)) as client:
        client.sendall(http_request(BODY | {"stream": stream}))
        ticket = engine.wait_for(1)
        assert not ticket.cancelled.is_set()
    assert ticket.cancelled.wait(SECONDS)


def test_what_takes_too_long_ends_and_frees_its_row(engine):
    engine.gate.clear()
    with served(engine, request_seconds=0.2) as (url, _):
        response = httpx.post(f"{url}/v1/completions", json=BODY, timeout=SECONDS)
        assert response.status_code == 504 and "0.2 seconds" in said(response)["message"]
        assert engine.tickets[0].cancelled.wait(SECONDS)
        body = BODY | {"stream": True}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS)
    *_, error, done, rest = response.text.split("\n\n")
    assert "0.2 seconds" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert (done, rest) == ("data: [DONE]", "")


def test_a_stream_that_is_read_slowly_ends_in_time_and_as_any_other(engine):
    with served(engine, request_seconds=0.5) as (url, _):
        address = httpx.URL(url)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((address.host, address.port))
            # More than the buffers on the way hold.
            body = BODY | {"prompt": "w" * 100_000, "max_tokens": 200, "stream": True}
            client.sendall(http_request(body))
            assert engine.wait_for(1).cancelled.wait(SECONDS)
            client.settimeout(SECONDS)
            said = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert b"no whole answer within 0.5 seconds" in said
    assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_breaks_off_is_told_without_paths_and_logged_with_them(
    server, engine, caplog, stream
):
    http, _ = server
    engine.broken = BankError("bank /srv/b: shard 3 cannot be read")
    response = http.post("/v1/completions", json=BODY | {"stream": stream})
    assert response.status_code == (200 if stream else 500)
    assert "the server's log says why" in response.text and "shard" not in response.text
    assert str(engine.broken) in caplog.text


def test_an_engine_that_cannot_says_why(server, engine):
    http, _ = server
    engine.alive, engine.failure = False, RuntimeError("out of memory")
    response = http.post("/v1/completions", json=BODY)
    assert response.status_code == 503 and "out of memory" in said(response)["message"]
    assert http.get("/health").status_code == 503


def test_a_server_that_goes_down_takes_nothing_more(server):
    http, state = server
    assert http.get("/health").json() == {
        "status": "ok", "model": "echo", "references": 3, "reason": None
    }  # fmt: skip
    state.draining = True
    assert http.get("/health").status_code == 503
    response = http.post("/v1/completions", json=BODY)
    assert response.status_code == 503 and "going down" in said(response)["message"]


def test_a_head_is_answered_as_its_get_without_the_body(server):
    http, state = server
    for path in ("/", "/health"):
        head, whole = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Content-Length"] == whole.headers["Content-Length"]
    state.draining = True
    assert http.head("/health").status_code == 503


def test_every_figure_of_the_engine_is_explained(tmp_path):
    engine = Engine(small_model(), small_reader(small_bank(tmp_path)), rows=1)
    assert set(engine.stats()) == set(HELP)
    engine.close()


def test_figures_are_those_of_the_requests_and_of_the_engine(server):
    http, _ = server
    http.post("/v1/completions", json=BODY)
    http.get("/nowhere/at/all")
    text = http.get("/metrics").text
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    count = "jaxlab_http_requests_total"
    assert found[count, (("endpoint", "/v1/completions"), ("status", "200"))] == 1
    assert found[count, (("endpoint", "other"), ("status", "404"))] == 1
    assert found["jaxlab_time_to_first_token_seconds_count", ()] == 1
    assert found["jaxlab_time_between_tokens_seconds_count", ()] == 2
    assert found["jaxlab_engine_generated_tokens_total", ()] == 7
    assert found["jaxlab_engine_cache_bytes", ()] == 12
