"""Search on a Qdrant server, behind the protocol that the local indexes have.

A point of the collection is a reference: its number is the row, its payload the source. The
collection says in its metadata which bank it was uploaded from.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.approximate import Blocks
from jaxlab.memory.retrieve import Allowed, Hits, check_queries, no_hits, require_finite

KEY = "QDRANT_API_KEY"
_SPARE = 16
_WIDEST = 1 << 16
_QUERIES = 64
_POINTS = 256


class QdrantIndex:
    """The rows of one bank in one collection. Made by :meth:`connect` or :meth:`upload`.

    ``location`` is the http(s) URL of a server, a folder (one process at a time, for thousands of
    references), or ``:memory:``. The key of a server that wants one is taken from the environment
    variable QDRANT_API_KEY. Scores are as the server says, and how near they come to exact
    search is a matter of its settings; equal scores are ordered by row.
    """

    def __init__(self, client: Any, location: str, collection: str, *, rows: int, dim: int) -> None:
        self._client, self._location, self._collection = client, location, collection
        self._rows, self._dim = rows, dim

    @classmethod
    def connect(
        cls, location: str, collection: str, *, rows: int, dim: int, bank: str, timeout: int = 10
    ) -> "QdrantIndex":
        """Open the collection of the bank whose fingerprint is ``bank``.

        Raises BankError when nothing answers within ``timeout`` seconds, when there is no such
        collection, and when it is of another bank or holds other numbers of rows or dimensions.
        """
        if "://" not in location and location != ":memory:" and not Path(location).is_dir():
            raise BankError(f"Qdrant folder {location}: does not exist; upload the bank first")
        index = cls(_open(location, timeout), location, collection, rows=rows, dim=dim)
        try:
            with index._asking() as client:
                there = client.collection_exists(collection)
            if not there:
                raise index._wrong("does not exist; upload the bank first")
            index._check_kind(bank)
            index._check_count()
        except BaseException:
            index.close()
            raise
        return index

    @classmethod
    def upload(
        cls,
        blocks: Blocks,
        sources: Sequence[str],
        location: str,
        collection: str,
        *,
        rows: int,
        dim: int,
        bank: str,
        timeout: int = 10,
    ) -> "QdrantIndex":
        """Send the bank block by block; ``sources`` has the source of each row.

        After an interruption the same call completes the collection. Raises what :meth:`connect`
        does; a collection of another bank is left as it is.
        """
        index = cls(_open(location, timeout), location, collection, rows=rows, dim=dim)
        try:
            index._create(bank)
            index._check_kind(bank)
            for first, block in blocks():
                require_finite(block, first)
                index._send(first, block, sources[first : first + len(block)])
            index._check_count()
        except BaseException:
            index.close()
            raise
        return index

    @property
    def dim(self) -> int:
        """Numbers in each embedding."""
        return self._dim

    def __len__(self) -> int:
        return self._rows

    def close(self) -> None:
        """Let go of the connection, or of the folder."""
        self._client.close()

    def search(
        self, queries: Float[np.ndarray, "n dim"], k: int, *, allowed: Allowed | None = None
    ) -> Hits:
        """The ``k`` nearest of the ``allowed`` rows, as the server finds them.

        The server gets the names of ``allowed.sources``; what it finds beyond the mask is dropped
        here, and asked for again in greater number until there are ``k``. Raises BankError where
        the mask lets so little through that this would be most of the bank, and what
        ``check_queries`` does.
        """
        queries = check_queries(self, queries, k, allowed)
        hits = no_hits(len(queries), k)
        waiting, limit = list(range(len(queries))), k + _SPARE
        while waiting and (allowed is None or allowed.count):
            short = []
            for start in range(0, len(waiting), _QUERIES):
                some = waiting[start : start + _QUERIES]
                for row, points in zip(some, self._ask(queries[some], limit, allowed), strict=True):
                    full = _fill(hits, row, points, allowed)
                    if not full and len(points) == limit < self._rows:
                        short.append(row)
            if short and limit >= _WIDEST:
                raise self._wrong(
                    f"of the {limit:,} nearest rows too few are allowed; name the sources that are"
                )
            waiting, limit = short, 4 * limit
        return hits

    def _ask(self, queries: np.ndarray, limit: int, allowed: Allowed | None) -> list[list[Any]]:
        from qdrant_client import models

        wanted = None
        if allowed is not None and allowed.sources is not None:
            among = models.MatchAny(any=list(allowed.sources))
            wanted = models.Filter(must=[models.FieldCondition(key="source", match=among)])
        requests = [
            models.QueryRequest(query=query.tolist(), limit=limit, filter=wanted)
            for query in queries
        ]
        with self._asking() as client:
            answers = client.query_batch_points(self._collection, requests=requests)
        return [answer.points for answer in answers]

    def _create(self, bank: str) -> None:
        from qdrant_client import models

        with self._asking() as client:
            if client.collection_exists(self._collection):
                return
            client.create_collection(
                self._collection,
                vectors_config=models.VectorParams(size=self.dim, distance=models.Distance.DOT),
                metadata={"bank": bank},
            )
            if "://" in self._location:  # the local modes look through all payloads
                client.create_payload_index(
                    self._collection, "source", field_schema=models.PayloadSchemaType.KEYWORD
                )

    def _send(self, first: int, block: np.ndarray, sources: Sequence[str]) -> None:
        if len(sources) != len(block):
            raise BankError(
                f"rows {first} … have {len(block)} embeddings but {len(sources)} sources"
            )
        with self._asking() as client:
            client.upload_collection(
                self._collection,
                vectors=block,
                payload=[{"source": str(source)} for source in sources],
                ids=range(first, first + len(block)),
                batch_size=_POINTS,
                wait=True,
            )

    def _check_kind(self, bank: str) -> None:
        from qdrant_client import models

        with self._asking() as client:
            config = client.get_collection(self._collection).config
        vectors, of = config.params.vectors, (config.metadata or {}).get("bank")
        if of != bank:
            raise self._wrong(
                f"is that of bank {of}, yours is {bank}; choose another name, or delete the"
                " collection and upload the bank"
                if of
                else "does not say which bank it is of (jaxlab did not make it, or the server is"
                " older than Qdrant 1.16); choose another name"
            )
        kind = (getattr(vectors, "size", None), getattr(vectors, "distance", None))
        if kind != (self.dim, models.Distance.DOT):
            raise self._wrong(
                f"has vectors of {kind[0]} numbers under {kind[1]}, the bank has {self.dim} under"
                " Dot; delete the collection and upload the bank"
            )

    def _check_count(self) -> None:
        with self._asking() as client:
            count = client.count(self._collection, exact=True).count
        if count != self._rows:
            raise self._wrong(
                f"holds {count:,} rows, the bank has {self._rows:,}; upload the bank again"
            )

    def _wrong(self, problem: str) -> BankError:
        return BankError(f"Qdrant {self._location}, collection {self._collection}: {problem}")

    @contextlib.contextmanager
    def _asking(self) -> Iterator[Any]:
        """The client; what it raises becomes one BankError."""
        from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

        try:
            yield self._client
        except UnexpectedResponse as error:
            if error.status_code in (401, 403):
                problem = f"the key in {KEY} is missing or not the right one"
            else:
                problem = f"answers {error.status_code} {error.reason_phrase}; see the server's log"
            raise self._wrong(problem) from error
        except ApiException as error:
            raise self._wrong(
                f"does not answer ({_reason(error)}); check the URL and that the server runs"
            ) from error


def _open(location: str, timeout: int) -> Any:
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise ConfigError(
            f"index Qdrant {location} needs the package qdrant-client: pip install 'jaxlab[qdrant]'"
        ) from error
    if location == ":memory:":
        return QdrantClient(location)
    try:
        if location.startswith(("http://", "https://")):
            # Asking for the version first would only warn where nothing answers.
            return QdrantClient(
                url=location,
                api_key=os.environ.get(KEY),
                timeout=timeout,
                check_compatibility=False,
            )
        if "://" in location:
            raise ConfigError(f"index Qdrant {location}: is no http(s) URL, folder or :memory:")
        return QdrantClient(path=location)
    except (ValueError, RuntimeError, OSError) as error:
        raise BankError(f"Qdrant {location}: cannot be opened ({_reason(error)})") from error


def _fill(hits: Hits, row: int, points: Sequence[Any], allowed: Allowed | None) -> bool:
    """Write the hits of one query; whether there were enough."""
    ids = np.array([point.id for point in points], np.int64)
    scores = np.array([point.score for point in points], np.float32)
    if allowed is not None:
        ids, scores = ids[allowed.mask[ids]], scores[allowed.mask[ids]]
    best = np.lexsort((ids, -scores))[: hits.ids.shape[1]]
    hits.ids[row, : len(best)], hits.scores[row, : len(best)] = ids[best], scores[best]
    return len(best) == hits.ids.shape[1]


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0][:200]
