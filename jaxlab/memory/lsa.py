"""Latent semantic analysis as an embedder: fitted on the references themselves, in seconds."""

import io
import json
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Integer

from jaxlab.errors import BankError, DataError

_FORMAT = "jaxlab-lsa"
_VERSION = 1
_WORD = re.compile(r"\w+")


def unit_rows(vectors: Float[np.ndarray, "n dim"]) -> Float32[np.ndarray, "n dim"]:
    """Divide each row by its length; rows of zeros stay zeros."""
    vectors = np.asarray(vectors, np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


@dataclass(frozen=True)
class LsaSettings:
    """What an LSA embedder computes, apart from what it learnt; stored with its state."""

    dim: int
    topics: int
    seed: int
    topic_share: float = 0.1
    word_bits: int = 18
    pair_bits: int = 19
    char_bits: int = 18
    char_sizes: tuple[int, ...] = (3, 4)
    pair_weight: float = 0.3
    char_weight: float = 0.6
    signs: int = 4

    @property
    def widths(self) -> tuple[int, int, int]:
        """Hashed features of words, of word pairs and of character n-grams."""
        return 1 << self.word_bits, 1 << self.pair_bits, 1 << self.char_bits


class LsaEmbedder:
    """Topics by truncated SVD beside a random projection of the same tf-idf vector.

    The two halves answer two needs. The SVD of tf-idf (latent semantic analysis) brings passages
    on one subject together, but spends its few directions on what many references share: a name
    that occurs in five of them is as good as deleted. The sparse random projection (signed
    hashes, Johnson-Lindenstrauss) keeps every inner product of the tf-idf vectors up to an error
    of about 1/sqrt(width), rare names included. Both are of unit length, so the score of a pair
    is ``topic_share * cos(topics) + (1 - topic_share) * cos(tf-idf)``.
    """

    name = "lsa"

    def __init__(
        self,
        settings: LsaSettings,
        *,
        idf: Float32[np.ndarray, " features"],
        columns: Int[np.ndarray, " chosen"],
        components: Float[np.ndarray, "chosen topics"],
    ) -> None:
        self.settings = settings
        self.dim = settings.dim
        self._idf = idf
        self._columns = columns
        self._components = components

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        *,
        dim: int = 512,
        seed: int = 0,
        topics: int = 128,
        chosen: int = 32_768,
        svd_texts: int = 12_000,
    ) -> "LsaEmbedder":
        """Learn word weights from all texts and topics from at most ``svd_texts`` of them.

        Raises DataError without a single word in ``texts`` or with ``dim`` below 32.
        """
        if dim < 32:
            raise DataError(f"lsa: dim is {dim}; use at least 32 (256 and 512 are usual)")
        settings = LsaSettings(dim=dim, topics=0, seed=seed)
        counts = _counts(texts, settings)
        seen = np.bincount(counts.indices, minlength=counts.shape[1])
        if not seen.any():
            raise DataError("lsa: no words to fit on; give it the texts of the references")
        idf = (1 + np.log((1 + len(texts)) / (1 + seen))).astype(np.float32)
        columns = _choose(seen, idf, limit=chosen)
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.permutation(len(texts))[:svd_texts])
        weighted = _weigh(counts[rows], _weights(idf, settings))[:, columns]
        components = _topics(weighted, topics=min(topics, dim // 2), seed=seed)
        settings = LsaSettings(dim=dim, topics=components.shape[1], seed=seed)
        return cls(settings, idf=idf, columns=columns, components=components)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dim"]:
        """Embed texts; a text without a letter or digit gives zeros."""
        out = np.zeros((len(texts), self.dim), np.float32)
        for start in range(0, len(texts), 4096):
            part = texts[start : start + 4096]
            out[start : start + len(part)] = self._embed(part)
        return out

    def _embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dim"]:
        weighted = _weigh(_counts(texts, self.settings), self._weights)
        exact = unit_rows(self._project(weighted))
        if not self.settings.topics:
            return exact
        topics = unit_rows(weighted[:, self._columns] @ self._wide_components)
        share = self.settings.topic_share
        both = [np.sqrt(share) * topics, np.sqrt(1 - share) * exact]
        return unit_rows(np.concatenate(both, axis=1))

    @cached_property
    def _wide_components(self) -> Float32[np.ndarray, "chosen topics"]:
        return self._components.astype(np.float32)

    @cached_property
    def _weights(self) -> Float32[np.ndarray, " features"]:
        return _weights(self._idf, self.settings)

    def _project(self, weighted: Any) -> Float32[np.ndarray, "n rest"]:
        """Multiply by the sign matrix: each feature has one ±1 in each of ``signs`` blocks.

        Its rows are hashes of the feature and the seed, made for the features at hand.
        """
        from scipy.sparse import csr_array

        features, place = np.unique(weighted.indices, return_inverse=True)
        signs, width = self.settings.signs, self.dim - self.settings.topics
        edges = np.linspace(0, width, signs + 1).astype(np.int64)
        entry = features.astype(np.uint64)[:, None] * np.uint64(signs) + np.arange(
            signs, dtype=np.uint64
        )
        random = _mix(entry + np.uint64(self.settings.seed) * np.uint64(0x9E3779B97F4A7C15))
        offset = (random >> np.uint64(1)) % np.diff(edges).astype(np.uint64)
        columns = (edges[:-1] + offset.astype(np.int64)).ravel()
        values = np.where(random & np.uint64(1), 1, -1).astype(np.float32).ravel()
        rows = np.arange(0, len(values) + 1, signs)
        matrix = csr_array((values, columns, rows), shape=(len(features), width))
        shape = (weighted.shape[0], len(features))
        return (csr_array((weighted.data, place, weighted.indptr), shape=shape) @ matrix).toarray()

    def to_bytes(self) -> bytes:
        """The fitted state as one .npz (no pickle) with a JSON header."""
        header = {"format": _FORMAT, "version": _VERSION, "settings": asdict(self.settings)}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            idf=self._idf,
            columns=self._columns,
            components=self._components,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, state: bytes) -> "LsaEmbedder":
        """Restore the embedder bit for bit; raises BankError when ``state`` is not one of ours."""
        try:
            with np.load(io.BytesIO(state), allow_pickle=False) as file:
                arrays = {name: file[name] for name in ("idf", "columns", "components")}
                header = json.loads(file["header"].tobytes())
            if (header["format"], header["version"]) != (_FORMAT, _VERSION):
                raise BankError(
                    f"lsa: the saved embedder says {header['format']} version {header['version']};"
                    f" this jaxlab reads {_FORMAT} version {_VERSION}; build the bank again"
                )
            stored = header["settings"]
            stored["char_sizes"] = tuple(stored["char_sizes"])
            return cls(LsaSettings(**stored), **arrays)
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise BankError(
                f"lsa: the saved embedder is damaged ({error}); build the bank again"
            ) from error


def _mix(values: Integer[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
    """Scramble 64-bit integers (the finaliser of splitmix64): the same on every machine."""
    values = values.astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _counts(texts: Sequence[str], settings: LsaSettings) -> Any:
    """Occurrences of hashed words, pairs of neighbouring words and character n-grams, as CSR."""
    from scipy.sparse import hstack

    vocabulary: dict[str, int] = defaultdict()
    vocabulary.default_factory = vocabulary.__len__
    rows = [[vocabulary[word] for word in _WORD.findall(text.lower())] for text in texts]
    ends = np.cumsum([0, *map(len, rows)])
    flat = np.fromiter((word for row in rows for word in row), np.int64, int(ends[-1]))
    hashes, chars = _word_features(list(vocabulary), settings)
    hashed = _mix(hashes)[flat]

    # A pair belongs to the text of its first word, unless that word is the text's last.
    paired = np.ones(len(flat), bool)
    paired[ends[1:][np.diff(ends) > 0] - 1] = False
    pairs = _mix(hashed * np.uint64(3) + np.roll(hashed, -1))[paired]
    pair_ends = np.concatenate([[0], np.cumsum(paired)])[ends]

    n_words, n_pairs, _ = settings.widths
    by_word = _tally(hashed & np.uint64(n_words - 1), ends, width=n_words)
    by_pair = _tally(pairs & np.uint64(n_pairs - 1), pair_ends, width=n_pairs)
    by_char = _tally(flat, ends, width=len(vocabulary)) @ chars
    counts = hstack([by_word, by_pair, by_char], format="csr")
    counts.sort_indices()
    return counts


def _tally(
    columns: Integer[np.ndarray, " entries"], ends: Integer[np.ndarray, " rows"], *, width: int
) -> Any:
    """How often each column occurs between one end and the next, as CSR."""
    from scipy.sparse import csr_array

    ones = np.ones(len(columns), np.float32)
    # Copies, because sum_duplicates works in place.
    entries = (ones, columns.astype(np.int64), ends.copy())
    counts = csr_array(entries, shape=(len(ends) - 1, width))
    counts.sum_duplicates()
    return counts


def _word_features(words: list[str], settings: LsaSettings) -> tuple[np.ndarray, Any]:
    """A 32-bit hash of each distinct word, and the counts of its hashed character n-grams.

    Character n-grams depend on the word alone, so they are cut once per distinct word, not once
    per occurrence: that is what makes them affordable.
    """
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.utils import murmurhash3_32

    def grams(word: str) -> list[str]:
        padded = f"<{word}>"
        return [
            padded[i : i + size]
            for size in settings.char_sizes
            for i in range(len(padded) - size + 1)
        ]

    hashes = [murmurhash3_32(word, seed=0, positive=True) for word in words]
    vectorizer = HashingVectorizer(
        analyzer=grams,
        n_features=settings.widths[2],
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    if not words:
        return np.zeros(0, np.uint64), csr_array((0, settings.widths[2]), dtype=np.float32)
    return np.array(hashes, np.uint64), csr_array(vectorizer.transform(words))


def _weights(
    idf: Float32[np.ndarray, " features"], settings: LsaSettings
) -> Float32[np.ndarray, " features"]:
    """The idf of each feature times the weight of its kind."""
    kinds = (1.0, settings.pair_weight, settings.char_weight)
    return idf * np.repeat(np.array(kinds, np.float32), settings.widths)


def _weigh(counts: Any, weights: Float32[np.ndarray, " features"]) -> Any:
    """Counts to (1 + log count) times weight: the tenth occurrence says less than the first."""
    weighted = counts.copy()
    weighted.data = (1 + np.log(counts.data)) * weights[counts.indices]
    return weighted


def _choose(
    seen: Int[np.ndarray, " features"], idf: Float32[np.ndarray, " features"], *, limit: int
) -> Int[np.ndarray, " chosen"]:
    """The features worth a row of the SVD: seen more than once, most tf-idf mass first."""
    mass = np.where(seen > 1, seen * idf**2, 0)
    order = np.argsort(-mass, kind="stable")[:limit]
    return np.sort(order[mass[order] > 0]).astype(np.int32)


def _topics(weighted: Any, *, topics: int, seed: int) -> Float[np.ndarray, "chosen topics"]:
    """Right singular vectors of the unit tf-idf rows, in float16 so that a saved copy is equal."""
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    topics = min(topics, *(size - 1 for size in weighted.shape))
    if topics < 1:
        return np.zeros((weighted.shape[1], 0), np.float16)
    _, sizes, rows = randomized_svd(normalize(weighted), topics, n_iter=2, random_state=seed)
    # Where texts repeat there are fewer topics than asked for; the rest would be noise.
    return np.ascontiguousarray(rows[sizes > 1e-3 * sizes[0]].T).astype(np.float16)
