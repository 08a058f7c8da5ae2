"""Laws of the tokenizer: nothing is lost, equal input gives equal files, errors say what to do."""

import hashlib

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlab.data.tokenizer import Tokenizer, train_tokenizer
from jaxlab.errors import DataError

CORPUS = ["the array of the arrays holds an array of values\n    and returns them: 12 + 34\n"] * 9
SMALL = 300


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet=" \n\t\r\u2581\0a<>0x41s/é😀", max_size=60))
@example("")
@example("  the array \n\n\n    x  ")
@example(" \u2581\u2581 \u2581a\u2581")
@example("<s></s><pad><unk><0x41>\r\n\u00a0\u3000\ufeff")
@example("a\0b e\u0301 \u00e9 👩\u200d🚀 ﬁ Ⅷ")
def test_decode_of_encode_is_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 < i < tokenizer.vocab_size for i in ids)
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(alphabet=" \n\u2581ae0é", max_size=20), max_size=6))
def test_a_batch_is_encoded_as_its_texts_one_by_one(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in batch)


def test_digits_stand_alone_and_words_take_their_space(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("of the array 1234")]
    assert pieces[-4:] == ["1", "2", "3", "4"]
    assert " the" in pieces
    assert pieces[0] == "of"


def test_control_ids_are_silent_and_broken_text_is_replaced(tokenizer):
    ids = tokenizer.encode("é the")
    silent = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id, 3]
    assert tokenizer.decode(silent) == tokenizer.decode(np.array(silent)) == "é the"
    first, second = tokenizer.encode("\u2582")[:2]
    assert tokenizer.decode([first, second, *ids]) == "\ufffdé the"
    assert tokenizer.decode([tokenizer.vocab_size, *ids, -1]) == "\ufffdé the\ufffd"


def test_the_preface_is_bos_and_the_word_reference(tokenizer):
    assert tokenizer.preface_ids[0] == tokenizer.bos_id
    assert tokenizer.decode(tokenizer.preface_ids) == "Reference:"
    assert tokenizer.preface_ids == (1, *tokenizer.encode("Reference:"))


def test_half_a_surrogate_pair_is_an_error(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(DataError, match="character 1"):
            encode("a\ud800")


def test_equal_arguments_give_equal_files_and_the_hash_is_theirs(tmp_path):
    a, b = (
        train_tokenizer(CORPUS, vocab_size=SMALL, path=tmp_path / name, seed=3)
        for name in ("a.model", "b.model")
    )
    assert a.hash == b.hash == hashlib.sha256((tmp_path / "a.model").read_bytes()).hexdigest()
    assert Tokenizer.load(tmp_path / "a.model").hash == a.hash
    assert a.vocab_size == SMALL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_no_more_than_max_bytes_are_read_and_the_seed_chooses_them(tmp_path):
    texts = [f"{word} {word}\n" * 60 for word in ("abca", "bcab", "cabb", "acbb", "bbca")]

    def trained(seed, max_bytes):
        return train_tokenizer(
            texts, vocab_size=273, path=tmp_path / "m", seed=seed, max_bytes=max_bytes
        ).hash

    assert len({trained(seed, 500) for seed in range(3)}) > 1
    assert trained(0, 500) == trained(0, 500) != trained(0, 10**6)


def test_lines_of_any_length_are_learnt_from(tmp_path):
    tokenizer = train_tokenizer(["the array " * 3000], vocab_size=280, path=tmp_path / "m")
    assert len(tokenizer.encode(" the array")) <= 5


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["a b c"], 500, "5 bytes cannot fill vocab_size=500"),
        (["".join(map(chr, range(0x4E00, 0x5000)))], 400, "cannot fill vocab_size=400"),
        (["a b c"], 100, "vocab_size is 100"),
        (["", " \n"], 400, "no text"),
    ],
)
def test_a_corpus_that_cannot_fill_the_vocabulary_is_an_error(tmp_path, texts, vocab_size, message):
    with pytest.raises(DataError, match=message) as caught:
        train_tokenizer(texts, vocab_size=vocab_size, path=tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.model: cannot be read"):
        Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "bad.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.model"):
        Tokenizer.load(tmp_path / "empty.model")


def test_a_tokenizer_with_other_control_ids_is_an_error(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "other"),
        vocab_size=40,
        minloglevel=3,
        hard_vocab_limit=False,
    )
    with pytest.raises(DataError, match=r"other\.model: pad, bos, eos, unk are \(-1, 1, 2, 0\)"):
        Tokenizer.load(tmp_path / "other.model")
