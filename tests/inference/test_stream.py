"""Laws of text that is shown while it grows: whole characters, never a part of the stop string."""

import itertools

import pytest

from jaxlab.inference.text import TextStream
from tests.inference.small import small_tokenizer


def shown(tokens, *stop):
    """The pieces shown after each token, and the stream at its end."""
    stream, pieces = TextStream(small_tokenizer(), stop), []
    for place, token in enumerate(tokens):
        done = stream.add(token)
        pieces.append(stream.fresh(final=done or place + 1 == len(tokens)))
        if done:
            break
    return pieces, stream


@pytest.mark.parametrize("text", ["abc", "aéb", "é😀", "naïve\n☃", "", "a\ufffdb"])
def test_the_pieces_are_the_text_and_no_character_is_split(text):
    tokens = small_tokenizer().encode(text)
    pieces, stream = shown(tokens)
    assert "".join(pieces) == stream.text == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
    assert all(text.startswith("".join(pieces[:n])) for n in range(len(pieces)))


def test_an_unfinished_character_waits_until_the_end():
    tokens = small_tokenizer().encode("a😀")
    pieces, stream = shown(tokens[:3])
    assert pieces == ["a", "", "\ufffd"] and stream.text == "a\ufffd"
    # What can no longer become a character is shown when the next token proves it.
    pieces, stream = shown([*tokens[:3], *small_tokenizer().encode("bc")])
    assert pieces == ["a", "", "", "\ufffdb", "c"] and stream.text == "a\ufffdbc"


@pytest.mark.parametrize(
    ("text", "stop", "rest"),
    [
        ("ab\ncd", "\n", "ab"),
        ("abcabd", "abd", "abc"),  # a beginning of the stop string that was none
        ("aaab", "aab", "a"),  # overlaps itself
        ("xéyz", "éy", "x"),  # a stop string that begins inside bytes
        ("abab", "zz", "abab"),
        ("abz", "zz", "abz"),  # ends like the stop string begins
        ("zzab", "zz", ""),
    ],
)
def test_a_stop_string_never_shows(text, stop, rest):
    pieces, stream = shown(small_tokenizer().encode(text), stop)
    assert "".join(pieces) == stream.text == rest
    for piece in itertools.accumulate(pieces):
        assert rest.startswith(piece)


def test_of_several_stop_strings_the_first_in_the_text_ends_it():
    tokens = small_tokenizer().encode("abcdefg")
    pieces, stream = shown(tokens, "efg", "de", "cx")
    assert "".join(pieces) == stream.text == "abc"
    # "c" waits for "cx", then "d" for "de".
    assert pieces == ["a", "b", "", "c", ""]


def test_text_is_shown_as_soon_as_it_is_certain():
    assert shown(small_tokenizer().encode("abxay"), "xy")[0] == ["a", "b", "", "xa", "y"]
