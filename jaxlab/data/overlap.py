"""The leak guard: how much of a reference a text contains.

Memory³, arXiv 2407.01178, §3.6 equation 6.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Integer


def overlap(
    text_tokens: Integer[np.ndarray, " T"], reference_tokens: Integer[np.ndarray, " R"]
) -> float:
    """Largest share of the reference that is a common subsequence within a short stretch of text.

    ``max N / |r|`` over common subsequences of length N whose first and last token lie at most
    ``2 |r|`` apart in the text (Memory³, §3.6 eq. 6). 0 for an empty reference.
    """
    if not len(reference_tokens):
        return 0.0
    return _longest(text_tokens, reference_tokens, known=0, enough=len(reference_tokens)) / len(
        reference_tokens
    )


def exceeds(
    text_tokens: Integer[np.ndarray, " T"],
    reference_tokens: Integer[np.ndarray, " R"],
    *,
    limit: float,
) -> bool:
    """Whether ``overlap`` is above ``limit``: the same answer, mostly without computing it."""
    allowed = most_allowed(len(reference_tokens), limit)
    if allowed >= len(reference_tokens):
        return False
    if allowed < 0 or _contains(text_tokens, reference_tokens):
        return True
    return _longest(text_tokens, reference_tokens, known=allowed, enough=allowed + 1) > allowed


def most_allowed(length: int, limit: float) -> int:
    """The largest N with ``N / length <= limit``, in the arithmetic of ``overlap`` itself."""
    if not length:
        return 0
    most = max(-1, min(length, math.floor(limit * length) + 1))
    while most >= 0 and most / length > limit:
        most -= 1
    return most


def _contains(text: np.ndarray, reference: np.ndarray) -> bool:
    """Whether the reference lies in the text as it is: the usual case, found by one byte search."""
    text, reference = text.astype(np.int32), reference.astype(np.int32)
    haystack, needle = text.tobytes(), reference.tobytes()
    at = haystack.find(needle)
    while at >= 0 and at % text.itemsize:
        at = haystack.find(needle, at + 1)
    return at >= 0


def _longest(text: np.ndarray, reference: np.ndarray, *, known: int, enough: int) -> int:
    """Longest common subsequence within a window of ``2 |r| + 1`` text tokens, if above ``known``.

    Only windows that start at a token of the reference matter. Moving a window by d tokens adds d
    new ones, so its result grows by at most d: after a window with n, the next that can beat the
    best so far starts ``best + 1 - n`` later. Stops at ``enough``.
    """
    masks: dict[int, int] = {}
    for position, token in enumerate(reference.tolist()):
        masks[token] = masks.get(token, 0) | 1 << position
    places = np.flatnonzero(np.isin(text, reference))
    found = [masks[token] for token in text[places].tolist()]
    ends = np.searchsorted(places, places + 2 * len(reference) + 1).tolist()
    starts, best, earliest = places.tolist(), known, 0
    for index, start in enumerate(starts):
        if start < earliest or ends[index] - index <= best:
            continue
        length = _common(found[index : ends[index]], len(reference))
        best = max(best, length)
        if best >= enough:
            break
        earliest = start + best + 1 - length
    return best


def _common(window: list[int], length: int) -> int:
    """Longest common subsequence by the bit-parallel recurrence, one integer per reference.

    ``window`` gives, for each token, the bit mask of its places in the reference.
    """
    full = (1 << length) - 1
    state = full
    for mask in window:
        taken = state & mask
        state = ((state + taken) | (state - taken)) & full
    return length - state.bit_count()
