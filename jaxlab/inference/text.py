"""The text of one sequence while it grows."""

import codecs
from collections.abc import Sequence

from jaxlab.data.tokenizer import Tokenizer


class TextStream:
    """Tokens in, text out as soon as it is certain.

    A character may take several byte tokens, and the start of a stop string may become all of it;
    what could still change is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = 0
        self.text = ""

    def add(self, token: int) -> bool:
        """Append a token; True when a stop string has appeared, before which the text then ends."""
        return self._append(self._bytes.decode(self._tokenizer.bytes_of(token)))

    def fresh(self, *, final: bool) -> str:
        """Text that has become certain since the last call; with ``final`` all there is."""
        if final:
            self._append(self._bytes.decode(b"", final=True))
        end = len(self.text) - (0 if final else self._undecided())
        part, self._shown = self.text[self._shown : end], max(end, self._shown)
        return part

    def _append(self, more: str) -> bool:
        before = len(self.text)
        self.text += more
        places = []
        for stop in self._stop:
            place = self.text.find(stop, max(0, before - len(stop) + 1))
            if place >= 0:
                places.append(place)
        if places:
            self.text = self.text[: min(places)]
            self._bytes.reset()
        return bool(places)

    def _undecided(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
