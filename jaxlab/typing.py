"""The legend of axis letters used in every array annotation, and the array aliases.

==========  ==============================================================
B           batch
T           query positions (context tokens of one sequence)
S           key positions (context tokens, or the length of the cache)
P           tokens of the reference preface ``<s>Reference:``
R           tokens of one reference (128 in the paper)
C           chunks of one sequence (64 tokens each in the paper)
M           memory slots that belong to one chunk
N, K, G     query heads, key-value heads, query heads per key-value head
H           head dimension
D, F, V     model width, feed-forward width, vocabulary
L           layers
==========  ==============================================================
"""

from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree", "Shaped"]
