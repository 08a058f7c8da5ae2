"""What the parameters of the decoder are, told by their names in the tree."""

import jax
import optax.contrib

from jaxlab.typing import PyTree

# Axes (inputs, outputs) of the matrices in a stack of layers, axis 0 being the layer.
MATRICES = {
    "query": (1, (2, 3)),
    "key": (1, (2, 3)),
    "value": (1, (2, 3)),
    "output": ((1, 2), 3),
    "gate": (1, 2),
    "up": (1, 2),
    "down": (1, 2),
}
# Root mean square of an AdamW update, to which Muon's are scaled: one learning rate fits both
# (arXiv 2502.16982, section 2.2).
ADAMW_RMS = 0.2
_BLOCK_OF = {
    "embedding": "embedding",
    "head": "head",
    "scale": "norm",
    "bias": "norm",
    "query": "query_key",
    "key": "query_key",
    "value": "value_output",
    "output": "value_output",
    "gate": "feed_forward",
    "up": "feed_forward",
    "down": "feed_forward",
}


def step_name(key: object) -> object:
    """What one step of a tree path is called: a dictionary's key or an attribute, else None."""
    return getattr(key, "key", getattr(key, "name", None))


def matrix_axes(params: PyTree) -> PyTree:
    """Which axes make a layer's matrix, for Muon; None for what is no matrix of a layer."""

    def axes(path: tuple, _) -> optax.contrib.MuonDimensionNumbers | None:
        found = MATRICES.get(step_name(path[-1]))
        return found and optax.contrib.MuonDimensionNumbers(*found)

    return jax.tree_util.tree_map_with_path(axes, params)


def block_labels(params: PyTree) -> PyTree:
    """The kind of block that each leaf of a decoder's parameters belongs to, by its path alone.

    One of ``embedding``, ``head`` (an untied output matrix), ``norm``, ``query_key``,
    ``value_output``, ``feed_forward``: the blocks of arXiv 2502.19002, section 3.

    Raises ValueError for a leaf with another name.
    """

    def label(path: tuple, _) -> str:
        # A parameter's own name is the last one; flax states put its value below it.
        names = [step_name(key) for key in path]
        for name in reversed(names):
            if name in _BLOCK_OF:
                return _BLOCK_OF[name]
        where = jax.tree_util.keystr(path)
        raise ValueError(f"{where} is no parameter of the decoder: pass labels of your own")

    return jax.tree_util.tree_map_with_path(label, params)
