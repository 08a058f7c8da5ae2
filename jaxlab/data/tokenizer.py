"""A sentencepiece tokenizer that loses nothing: train, load, encode, decode."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32

from jaxlab.errors import DataError

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
REFERENCE_PREFACE = "Reference:"
MAX_TRAINING_BYTES = 16_000_000
_SPACE = "\u2581"  # sentencepiece writes a space with this character, in pieces and inside itself
_SYMBOLS = ("\n", "\n\n", "\t", *(_SPACE * run for run in (4, 8, 12, 16)))
_LONGEST_LINE = 2000  # characters; the trainer drops lines of more than 4192 bytes
_SMALLEST = 4 + len(_SYMBOLS) + 256  # control ids, symbols, one piece per byte


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    path: str | Path,
    seed: int = 0,
    max_bytes: int = MAX_TRAINING_BYTES,
) -> Tokenizer:
    """Train a byte-fallback BPE model of exactly ``vocab_size`` pieces and write it to ``path``.

    Text is not normalised and gets no dummy prefix; digits stand alone; a new line, a tab and runs
    of spaces are pieces. At most ``max_bytes`` (UTF-8) are read, chosen by ``seed``; equal
    arguments give equal files. Raises DataError when the corpus cannot fill the vocabulary.
    """
    import sentencepiece

    if vocab_size <= _SMALLEST:
        raise DataError(f"vocab_size is {vocab_size}: the smallest that can be is {_SMALLEST + 1}")
    lines = list(_training_lines(list(texts), seed=seed, max_bytes=max_bytes))
    if not lines:
        raise DataError("cannot train a tokenizer: the corpus holds no text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=list(_SYMBOLS),
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            num_threads=1,  # part of the file, so of its hash
            minloglevel=3,
        )
    except RuntimeError as error:
        size = sum(len(line.encode()) for line in lines)
        raise DataError(
            f"a corpus of {size} bytes cannot fill vocab_size={vocab_size}: "
            f"use a smaller vocabulary or more text ({_last_sentence(error)})"
        ) from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    temporary.replace(path)
    return Tokenizer.load(path)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Tokenizer:
    """Text to token ids and back: ``decode(encode(text)) == text`` for every text."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    hash: str  # SHA-256 (hex) of the model file
    byte_lengths: Int32[np.ndarray, " V"]  # bytes of text that each id stands for
    _pieces: tuple[bytes, ...] = field(default=())
    _processor: Any = None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a model file that ``train_tokenizer`` wrote. Raises DataError."""
        import sentencepiece

        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(
                f"tokenizer {path}: cannot be read ({reason}): train one first"
            ) from error
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=data)
            ids = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
        except RuntimeError as error:
            raise DataError(
                f"tokenizer {path}: not a sentencepiece model: train it anew"
            ) from error
        if ids != (PAD_ID, BOS_ID, EOS_ID, UNK_ID) or not processor.is_byte(_byte_id(processor, 0)):
            raise DataError(
                f"tokenizer {path}: pad, bos, eos, unk are {ids} and not "
                f"{(PAD_ID, BOS_ID, EOS_ID, UNK_ID)}, or byte pieces lack: train it with jaxlab"
            )
        pieces = tuple(_piece_bytes(processor, i) for i in range(processor.vocab_size()))
        return cls(
            vocab_size=processor.vocab_size(),
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            hash=hashlib.sha256(data).hexdigest(),
            byte_lengths=np.array([len(piece) for piece in pieces], np.int32),
            _pieces=pieces,
            _processor=processor,
        )

    @property
    def preface_ids(self) -> tuple[int, ...]:
        """``<s>Reference:``, what stands before every reference (Memory³, §3.2)."""
        return (self.bos_id, *self.encode(REFERENCE_PREFACE))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without bos or eos. Raises DataError for half surrogates."""
        _check_utf8(text)
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE)):
            if number:  # the character that stands for a space inside sentencepiece goes as bytes
                ids += [_byte_id(self._processor, byte) for byte in _SPACE.encode()]
            ids += self._processor.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """``encode`` of many texts at once, on all cores."""
        plain = [text for text in texts if _SPACE not in text]
        for text in plain:
            _check_utf8(text)
        encoded = iter(self._processor.encode(plain, num_threads=os.cpu_count() or 1))
        return [
            np.array(self.encode(text) if _SPACE in text else next(encoded), np.int32)
            for text in texts
        ]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ``ids``; control ids are silent, what is no UTF-8 or no id is U+FFFD."""
        return b"".join(self.bytes_of(i) for i in map(index, ids)).decode("utf-8", "replace")

    def bytes_of(self, token: int) -> bytes:
        """What one id adds to the UTF-8 of a text; one that is no id adds a byte that is none."""
        return self._pieces[token] if 0 <= token < self.vocab_size else b"\xff"


def _training_lines(texts: Sequence[str], *, seed: int, max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for chosen in np.random.default_rng(seed).permutation(len(texts)):
        for line in texts[chosen].split("\n"):
            for start in range(0, len(line), _LONGEST_LINE):
                part = line[start : start + _LONGEST_LINE]
                left -= len(part.encode("utf-8", "replace"))
                if left < 0:
                    return
                if part.strip():
                    yield part.encode("utf-8", "replace").decode()


def _last_sentence(error: Exception) -> str:
    reason = str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1]
    return reason.partition(" Increase vocab_size")[0].strip(" .")


def _byte_id(processor: Any, byte: int) -> int:
    return processor.piece_to_id(f"<0x{byte:02X}>")


def _piece_bytes(processor: Any, piece_id: int) -> bytes:
    if processor.is_control(piece_id) or processor.is_unknown(piece_id):
        return b""
    piece = processor.id_to_piece(piece_id)
    if processor.is_byte(piece_id):
        return bytes([int(piece[1:-1], 16)])
    return piece.replace(_SPACE, " ").encode()


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"half of a surrogate pair at character {error.start}: the text has no UTF-8 form"
        ) from error
