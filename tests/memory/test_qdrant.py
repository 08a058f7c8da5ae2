"""Laws of search on Qdrant: it finds what exact search finds, in the collection of its own bank.

No server is at hand where the tests run: the client's own local modes search, and ``served``
answers over HTTP out of one of them, so that what travels is seen.
"""

import builtins
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.embedders import unit_rows
from jaxlab.memory.qdrant import QdrantIndex
from jaxlab.memory.retrieve import Allowed, FlatIndex, Index

ROWS, DIM, BANK = 700, 8, "3f9a"
BOOK = {"rows": ROWS, "dim": DIM, "bank": BANK}
VECTORS = unit_rows(np.random.default_rng(0).standard_normal((ROWS, DIM)))
QUERIES = unit_rows(np.random.default_rng(1).standard_normal((70, DIM)))
SOURCES = [f"notes/{row % 7}.txt" for row in range(ROWS)]
EXACT = FlatIndex(VECTORS)


def blocks():
    return ((first, VECTORS[first : first + 300]) for first in range(0, ROWS, 300))


def upload(location: str, **other) -> QdrantIndex:
    return QdrantIndex.upload(blocks, SOURCES, str(location), "notes", **(BOOK | other))


def near(one, other) -> None:
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)


class Server(ThreadingHTTPServer):
    """The part of Qdrant's REST interface that an index needs, over a client in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.client, self.asked, self.refuse = QdrantClient(":memory:"), [], None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, verb: str, path: str, body: dict):
        _, _, name, *rest = path.partition("?")[0].split("/")
        match verb, rest:
            case "GET", ["exists"]:
                return {"exists": self.client.collection_exists(name)}
            case "GET", []:
                return self.client.get_collection(name).model_dump(mode="json")
            case "PUT", []:
                return self.client.create_collection(
                    name,
                    vectors_config=models.VectorParams(**body["vectors"]),
                    metadata=body["metadata"],
                )
            case "PUT", ["index"]:
                return {"operation_id": 0, "status": "completed"}
            case "PUT", ["points"]:
                points = models.PointsList(**body).points
                return self.client.upsert(name, points=points).model_dump(mode="json")
            case "POST", ["points", "count"]:
                return {"count": self.client.count(name).count}
            case "POST", ["points", "query", "batch"]:
                requests = [models.QueryRequest(**search) for search in body["searches"]]
                found = self.client.query_batch_points(name, requests=requests)
                return [one.model_dump(mode="json") for one in found]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.loads(content) if content else {}
        with self.server.lock:
            self.server.asked.append((self.path.partition("?")[0], body, self.headers["api-key"]))
            status = self.server.refuse or 200
            result = (
                None if self.server.refuse else self.server.answer(self.command, self.path, body)
            )
        answer = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def index() -> QdrantIndex:
    return upload(":memory:")


# ---------------------------------------------------------------------------- search


def test_hits_are_those_of_exact_search(index):
    assert isinstance(index, Index) and (len(index), index.dim) == (ROWS, DIM)
    for k in (1, 5, ROWS + 3):
        near(index.search(QUERIES, k), EXACT.search(QUERIES, k))
    assert index.search(QUERIES[:0], 3).ids.shape == (0, 3)


def test_hits_do_not_depend_on_the_other_queries_of_the_call(index):
    together = index.search(QUERIES, 5)
    for i in range(0, 70, 9):
        alone = index.search(QUERIES[i : i + 1], 5)
        np.testing.assert_array_equal(alone.ids[0], together.ids[i])
        np.testing.assert_array_equal(alone.scores[0], together.scores[i])


@pytest.mark.parametrize("share", [0.0, 0.002, 0.1, 0.9, 1.0])
def test_only_allowed_rows_are_found_and_all_of_them(index, share):
    mask = np.random.default_rng(2).random(ROWS) < share
    for sources in (None, tuple(sorted({SOURCES[row] for row in np.flatnonzero(mask)}))):
        allowed = Allowed(mask, sources)
        near(index.search(QUERIES, 5, allowed=allowed), EXACT.search(QUERIES, 5, allowed=allowed))


def test_a_mask_too_narrow_to_look_for_asks_for_sources(index, monkeypatch):
    monkeypatch.setattr("jaxlab.memory.qdrant._WIDEST", 50)
    mask = np.array([source == "notes/3.txt" for source in SOURCES])
    mask[3::14] = False
    with pytest.raises(BankError, match="too few are allowed; name the sources"):
        index.search(QUERIES, 20, allowed=Allowed(np.arange(ROWS) < 30))
    allowed = Allowed(mask, ("notes/3.txt",))
    near(index.search(QUERIES, 5, allowed=allowed), EXACT.search(QUERIES, 5, allowed=allowed))


def test_what_cannot_be_searched_is_an_error(index):
    with pytest.raises(ValueError, match="at least one"):
        index.search(QUERIES, 0)
    with pytest.raises(BankError, match="vectors of 8"):
        index.search(QUERIES[:, :3], 1)
    with pytest.raises(BankError, match="has 2 entries but the index has 700 rows"):
        index.search(QUERIES, 1, allowed=Allowed(np.ones(2, bool)))


# ---------------------------------------------------------------------------- collections


# The client that finds the folder taken leaves its lock file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_keeps_the_collection_for_one_process_at_a_time(tmp_path):
    first = upload(tmp_path / "qdrant")
    with pytest.raises(BankError, match="qdrant: cannot be opened .*already accessed"):
        QdrantIndex.connect(str(tmp_path / "qdrant"), "notes", **BOOK)
    first.close()
    again = QdrantIndex.connect(str(tmp_path / "qdrant"), "notes", **BOOK)
    near(again.search(QUERIES, 5), EXACT.search(QUERIES, 5))
    again.close()


def test_what_was_interrupted_is_completed_by_the_same_call(tmp_path):
    def half():
        yield 0, VECTORS[:300]
        raise KeyboardInterrupt

    place = str(tmp_path / "qdrant")
    with pytest.raises(KeyboardInterrupt):
        QdrantIndex.upload(half, SOURCES, place, "notes", **BOOK)
    with pytest.raises(BankError, match="holds 300 rows, the bank has 700; upload the bank again"):
        QdrantIndex.connect(place, "notes", **BOOK)
    whole = upload(place)
    near(whole.search(QUERIES, 5), EXACT.search(QUERIES, 5))
    whole.close()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"bank": "77aa"}, "is that of bank 3f9a, yours is 77aa"),
        ({"dim": 9}, "has vectors of 8 numbers under Dot, the bank has 9"),
        ({"rows": 701}, "holds 700 rows, the bank has 701"),
    ],
)
def test_the_collection_of_another_bank_is_refused(tmp_path, other, message):
    upload(tmp_path).close()
    with pytest.raises(BankError, match=f"collection notes: {message}"):
        QdrantIndex.connect(str(tmp_path), "notes", **(BOOK | other))
    if "bank" in other:
        with pytest.raises(BankError, match=message):
            upload(tmp_path, **other)
    QdrantIndex.connect(str(tmp_path), "notes", **BOOK).close()


def test_a_collection_that_jaxlab_did_not_make_is_left_alone(tmp_path):
    client = QdrantClient(path=str(tmp_path))
    kind = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    client.create_collection("notes", vectors_config=kind)
    client.create_collection("cosine", vectors_config=kind, metadata={"bank": BANK})
    client.close()
    with pytest.raises(BankError, match="does not say which bank"):
        upload(tmp_path)
    with pytest.raises(BankError, match="of 8 numbers under Cosine"):
        QdrantIndex.connect(str(tmp_path), "cosine", **BOOK)
    with pytest.raises(BankError, match="collection other: does not exist; upload"):
        QdrantIndex.connect(str(tmp_path), "other", **BOOK)
    with pytest.raises(BankError, match="nowhere: does not exist; upload"):
        QdrantIndex.connect(str(tmp_path / "nowhere"), "notes", **BOOK)
    with pytest.raises(BankError, match="rows 0 … have 300 embeddings but 2 sources"):
        QdrantIndex.upload(blocks, SOURCES[:2], ":memory:", "notes", **BOOK)


# ---------------------------------------------------------------------------- servers


def test_a_server_is_sent_the_bank_once_and_names_of_sources_with_each_query(server):
    upload(server.url).close()
    index = QdrantIndex.connect(server.url, "notes", **BOOK)
    mask = np.array([source in ("notes/1.txt", "notes/4.txt") for source in SOURCES])
    mask[1] = False
    server.asked.clear()
    for allowed in (None, Allowed(mask, ("notes/1.txt", "notes/4.txt"))):
        near(index.search(QUERIES, 5, allowed=allowed), EXACT.search(QUERIES, 5, allowed=allowed))
    assert {path for path, _, _ in server.asked} == {"/collections/notes/points/query/batch"}
    filters = [body["searches"][0].get("filter") for _, body, _ in server.asked]
    among = {"key": "source", "match": {"any": ["notes/1.txt", "notes/4.txt"]}}
    assert filters[0] is None and filters[-1] == {"must": [among]}
    index.close()


def test_the_key_comes_from_the_environment(server, monkeypatch):
    upload(server.url).close()
    assert {key for _, _, key in server.asked} == {None}
    server.asked.clear()
    monkeypatch.setenv("QDRANT_API_KEY", "open sesame")
    with pytest.warns(UserWarning, match="insecure"):  # as it is not https
        QdrantIndex.connect(server.url, "notes", **BOOK).close()
    assert {key for _, _, key in server.asked} == {"open sesame"}


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "the key in QDRANT_API_KEY is missing or"), (403, "the key in"), (500, "answers 500")],
)
def test_a_server_that_refuses_is_named_with_its_reason(server, status, message):
    server.refuse = status
    with pytest.raises(BankError, match=f"Qdrant {server.url}, collection notes: {message}"):
        QdrantIndex.connect(server.url, "notes", **BOOK)


def test_where_nothing_answers_there_is_one_error(server):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as silent:  # listens and never answers
        url = f"http://127.0.0.1:{silent.server_port}"
        for call in (
            lambda: QdrantIndex.connect(url, "notes", **BOOK, timeout=1),
            lambda: upload(url, timeout=1),
        ):
            with pytest.raises(BankError, match=f"{url}, collection notes: does not answer"):
                call()
    with pytest.raises(BankError, match="does not answer .*refused.*check the URL"):
        QdrantIndex.connect(url, "notes", **BOOK)  # closed by now
    with pytest.raises(ConfigError, match="is no http.s. URL, folder or :memory:"):
        QdrantIndex.connect("ftp://somewhere", "notes", **BOOK)


def test_the_package_is_asked_for_by_name(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("qdrant_client"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'jaxlab\[qdrant\]'"):
        upload(":memory:")
