"""The default corpus: the documentation that any Python installation carries (about 10 MB)."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from jaxlab.data.sources import Document

FIRST_PACKAGES = ("numpy", "scipy")
MORE_PACKAGES = (
    *("jax", "flax", "optax", "orbax", "grain", "sklearn", "matplotlib", "pandas", "sympy"),
    *("networkx", "statsmodels", "xarray", "dask", "skimage", "astropy", "nltk", "torch"),
    *("torchvision", "transformers", "datasets", "tensorstore", "einops", "PIL"),
)
FULL_BYTES = 10_000_000
OWN_DOCUMENT = 400  # characters from which a docstring stands alone
SHORTEST_DOCSTRING = 24
SHORTEST_DOCUMENT = 200
_SKIPPED_FOLDERS = frozenset(
    (
        *("test", "tests", "testing", "_test", "_tests", "__pycache__", "site-packages"),
        *("dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
        *("_vendor", "externals", "vendored"),
    )
)


def installed_documents() -> Iterator[Document]:
    """Yield the installed documentation: topics, standard library, NumPy and SciPy, then the rest.

    Nothing is imported but ``pydoc_data.topics``: docstrings are read from the sources. The units
    (topics and modules) of each of the two groups come in the order of a hash of their names, so
    that any beginning of the stream mixes all packages of the group. Ends at about 10 MB.
    """
    seen: set[str] = set()
    total = 0
    for group in (_first_group(), _modules_of(MORE_PACKAGES)):
        for name, unit in sorted(group.items(), key=lambda item: _order(item[0])):
            documents = _module(name, unit, seen) if isinstance(unit, Path) else [unit]
            for document in documents:
                yield document
                total += len(document.text.encode())
            if total >= FULL_BYTES:
                return


def _first_group() -> dict[str, Path | Document]:
    units: dict[str, Path | Document] = dict(_modules_of(FIRST_PACKAGES))
    units.update(_modules_under(Path(sysconfig.get_path("stdlib")), prefix=""))
    units.update(_topics())
    return units


def _topics() -> dict[str, Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart; the docstrings remain
        return {}
    names = {f"topic:{name}": text for name, text in topics.items()}
    return {name: Document(name, _clean(text)) for name, text in names.items()}


def _modules_of(packages: tuple[str, ...]) -> dict[str, Path]:
    units: dict[str, Path] = {}
    for package in packages:
        spec = importlib.util.find_spec(package)  # a top-level name is found without importing it
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            units.update(_modules_under(Path(folder), prefix=f"{package}."))
    return units


def _modules_under(root: Path, *, prefix: str) -> dict[str, Path]:
    units = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and f.isidentifier()]
        for file in files:
            if file.endswith(".py"):
                parts = Path(folder, file[:-3]).relative_to(root).parts
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                units[f"{prefix}{'.'.join(parts)}".rstrip(".")] = Path(folder, file)
    return units


def _order(name: str) -> bytes:
    return hashlib.sha256(f"installed-docs\0{name}".encode()).digest()


def _module(name: str, path: Path, seen: set[str]) -> list[Document]:
    """The documents of one module; ``seen`` collects docstrings so that copies come once."""
    documents, short = [], []
    for qualified, docstring in _docstrings(name, path):
        text = _clean(docstring)
        if len(text) < SHORTEST_DOCSTRING or text in seen:
            continue
        seen.add(text)
        if len(text) >= OWN_DOCUMENT:
            documents.append(Document(qualified, f"{qualified}\n\n{text}\n"))
        else:
            short.append(f"{qualified}\n\n{text}\n")
    merged = "\n".join(short)
    if len(merged) >= SHORTEST_DOCUMENT:
        documents.append(Document(f"{name}:short", merged))
    return documents


def _docstrings(name: str, path: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the escapes of other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # templates and sources of other Python versions hold no English we could reach
    stack: list[tuple[str, ast.AST]] = [(name, tree)]
    while stack:
        qualified, node = stack.pop()
        docstring = ast.get_docstring(node)  # type: ignore[arg-type]
        if docstring:
            yield qualified, docstring
        for child in reversed(node.body):  # type: ignore[attr-defined]
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((f"{qualified}.{child.name}", child))


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: docstrings about Unicode contain half surrogates and NUL."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode().strip()
