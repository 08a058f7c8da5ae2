"""YAML to frozen dataclasses, refusing everything that the dataclasses do not name.

The annotations are the schema: nested dataclasses, ``X | None``, ``Literal`` and the four scalars.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxlab.errors import ConfigError


class InvalidValue(ConfigError):
    """A value that its own class refuses; ``build`` adds the file and the full dotted key."""

    def __init__(self, key: str, problem: str):
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem


@dataclass(frozen=True)
class Source:
    """Where values come from: a file, and the overrides that were laid on top of it."""

    file: str
    overrides: dict[str, str] = field(default_factory=dict)  # dotted key → flag and text

    def error(self, key: str, problem: str) -> ConfigError:
        """An error that names the override that set ``key``, or else the file."""
        where = self.file
        for given, text in self.overrides.items():
            if key == given or key.startswith(f"{given}."):
                where = text
        return ConfigError(f"{where}: {key}: {problem}")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-3`` as a number and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    mapping = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            problem = f"the key {key!r} is not a word; quote it"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        if key in mapping:
            problem = f"the key {key!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text; ConfigError, naming ``where`` it stands, when it is none."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line}: not readable as YAML: {problem}") from None
    except ValueError as error:  # such as an impossible date
        raise ConfigError(f"{where}: not readable as YAML: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The top-level mapping of a YAML file; ConfigError when there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; {_there_is(path)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    raw = parse(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {_describe(raw)}")
    return raw


def _there_is(path: Path) -> str:
    """The configurations that lie where one was looked for, or in ``configs``; the likely one."""
    folders = [folder for folder in (path.parent, Path("configs")) if any(folder.glob("*.yaml"))]
    if not folders:
        return "give the path of a YAML file, such as one of configs/ in a checkout"
    known = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml")}
    # A preset's name may be given, which writes dashes and points.
    wanted = path.name.removesuffix(".yaml").replace("-", "_").replace(".", "_")
    if near := difflib.get_close_matches(wanted, known, n=1, cutoff=0.7):
        return f"did you mean {known[near[0]]}?"
    return f"there are {', '.join(str(file) for file in sorted(known.values()))}"


def apply_overrides(
    raw: dict[str, Any], overrides: Sequence[str], source: Source, *, flag: str = "--set"
) -> None:
    """Lay ``a.b=value`` texts over ``raw`` in place; values are YAML. The later one wins.

    ``source`` remembers them with the ``flag`` that they were given by.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"{flag} {text}: expected KEY=VALUE, such as {flag} seed=1")
        node = raw
        for depth, part in enumerate(parts[:-1], start=1):
            if not isinstance(node.get(part), dict):
                # The file has no such section: the override answers for all of it.
                source.overrides[".".join(parts[:depth])] = f"{flag} {text}"
                node[part] = {}
            node = node[part]
        node[parts[-1]] = parse(value, f"{flag} {text}")
        source.overrides[".".join(parts)] = f"{flag} {text}"


def build(cls: type, raw: Any, source: Source, *, key: str = "", root: type | None = None) -> Any:
    """An instance of the dataclass ``cls`` from a mapping, checked key by key.

    Raises ConfigError for a key that ``cls`` has not (with the closest known one), a missing key, a
    value of another type, and whatever the classes themselves refuse (InvalidValue).
    """
    root = root or cls
    if not isinstance(raw, dict):
        raise source.error(key, f"expected a mapping of keys to values, got {_describe(raw)}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in raw:
        if name not in fields:
            raise source.error(_join(key, name), f"unknown key; {_hint(name, key, fields, root)}")
    for name, item in fields.items():
        no_default = item.default is dataclasses.MISSING
        if name not in raw and no_default and item.default_factory is dataclasses.MISSING:
            raise source.error(_join(key, name), "missing; this key has no default")
    values = {
        name: _convert(value, hints[name], _join(key, name), source, root)
        for name, value in raw.items()
    }
    try:
        return cls(**values)
    except InvalidValue as error:
        raise source.error(_join(key, error.key), error.problem) from None


def _convert(value: Any, hint: Any, key: str, source: Source, root: type) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
        return _convert(value, hint, key, source, root)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, source, key=key, root=root)
    if origin is Literal:
        options = typing.get_args(hint)
        if any(type(value) is type(option) and value == option for option in options):
            return value
        listed = ", ".join(map(str, options))
        raise source.error(key, f"must be one of {listed}; got {_describe(value)}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise source.error(key, f"expected {_NAMES[hint]}, got {_describe(value)}")
    if hint is float and not math.isfinite(value):
        raise source.error(key, f"must be finite, got {value}")
    return value


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"{value!r} ({_NAMES.get(type(value), type(value).__name__)})"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        key = _join(prefix, item.name)
        yield key
        for option in (hints[item.name], *typing.get_args(hints[item.name])):
            if dataclasses.is_dataclass(option):
                yield from _dotted_keys(option, key)


def _hint(name: str, prefix: str, fields: dict[str, Any], root: type) -> str:
    """A sibling that looks alike; else the same name elsewhere; else all siblings."""
    if alike := difflib.get_close_matches(name, fields, n=1, cutoff=0.6):
        return f"did you mean {_join(prefix, alike[0])}?"
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(list(_dotted_keys(root)))}
    if alike := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.6):
        return f"did you mean {elsewhere[alike[0]]}?"
    return f"{prefix or 'this workload'} has {', '.join(fields)}"
