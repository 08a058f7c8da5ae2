"""The text of a compiled module: computations, instructions, shapes, loops, source lines.

``compiled.as_text()`` of a CPU or TPU program in, plain data out. The text is the compiler's own
and has no stable grammar; what is read here is what jaxlib 0.10 to 0.12 print.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ITEM_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip

_SHAPE = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|body|to_apply|called_computations)=\{?%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%([\w.\-]+)")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type, sizes, and where the layout puts it.

    tile: the innermost tile, (8, 128) on a TPU; space: 0 is the chip's main memory.
    """

    dtype: str
    sizes: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def bytes(self) -> int:
        """Of the elements alone."""
        return self._bytes(self.sizes)

    @property
    def stored_bytes(self) -> int:
        """With the padding of the tile."""
        sizes = [self.sizes[axis] for axis in self.order] or list(self.sizes[::-1]) or [1]
        for place, side in enumerate(self.tile[::-1]):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // side) * side
        return self._bytes(sizes)

    def _bytes(self, sizes) -> int:
        return math.ceil(math.prod(sizes) * ITEM_BITS.get(self.dtype, 8) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. ``shapes`` are the arrays of its result, a tuple's leaves in order."""

    name: str
    op: str
    shapes: tuple[Shape, ...]
    is_tuple: bool
    operands: tuple[str, ...]
    text: str
    root: bool

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that run when this does; of a conditional, its branches."""
        if branches := _BRANCHES.search(self.text):
            return tuple(_NAME.findall(branches[1]))
        return tuple(_TRUE_FALSE.findall(self.text)) or tuple(_CALLED.findall(self.text))

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the line's attributes, or None."""
        found = re.search(pattern, self.text)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from: ``jit(step)/while/body/...``."""
        return self.attribute(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of the text, which in a compiled TPU program is the schedule."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Its instructions by name."""
        return {each.name: each for each in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(each for each in self.instructions if each.root)


class Frame(NamedTuple):
    """A place in the source; ``function`` is qualified, or empty where it is not known."""

    file: str
    line: int
    function: str = ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    entry: str
    computations: dict[str, Computation]
    header: str

    @functools.cached_property
    def _frames(self) -> dict[int, tuple[Frame, int]]:
        """Stack frames by number, with the number of the caller's frame (0: none)."""
        files, functions = (
            dict(re.findall(r'^(\d+) "(.*)"$', _section(self.header, title), re.M))
            for title in ("FileNames", "FunctionNames")
        )
        places = {
            number: Frame(files.get(file, ""), int(line), functions.get(function, ""))
            for number, file, function, line in re.findall(
                r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)",
                _section(self.header, "FileLocations"),
                re.M,
            )
        }
        frames = re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?",
            _section(self.header, "StackFrames"),
            re.M,
        )
        # A caller's number is written one too high, so that 1 is none.
        return {
            int(number): (places.get(place, Frame("", 0)), int(parent or 1) - 1)
            for number, place, parent in frames
        }

    def stack(self, instruction: Instruction) -> list[Frame]:
        """Where it was traced, the innermost place first; empty where the compiler kept none."""
        file = instruction.attribute(r'source_file="([^"]*)"')
        if file:
            return [Frame(file, int(instruction.attribute(r"source_line=(\d+)") or 0))]
        number, found = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0), []
        while number in self._frames and len(found) < 100:
            frame, number = self._frames[number]
            found.append(frame)
        return found

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a ``while`` runs its body; None when the text does not tell."""
        if known := _TRIPS.search(loop.text):
            return int(known[1])
        condition = self.computations.get(loop.attribute(_CONDITION.pattern) or "")
        if condition is None or condition.root.op != "compare":
            return None
        index, last = (condition.by_name.get(name) for name in condition.root.operands)
        if index is None or last is None or index.op != "get-tuple-element":
            return None
        if last.op != "constant" or "direction=LT" not in condition.root.text:
            return None
        first = _start(computation, loop, int(index.attribute(r"index=(\d+)") or 0))
        return max(int(last.attribute(r"constant\((-?\d+)\)") or 0) - first, 0)

    def size(self, name: str) -> int:
        """Instructions in a computation and all that it calls."""
        found = self.computations[name].instructions
        return len(found) + sum(self.size(part) for each in found for part in each.called)


def _start(computation: Computation, loop: Instruction, index: int) -> int:
    """The value with which a counter enters a loop; 0 where the text does not tell."""
    value = computation.by_name.get(loop.operands[0])
    if value is not None and value.op == "tuple":
        value = computation.by_name.get(value.operands[index])
    while value is not None and value.op in ("copy", "bitcast"):
        value = computation.by_name.get(value.operands[0])
    if value is None or value.op != "constant":
        return 0
    return int(value.attribute(r"constant\((-?\d+)\)") or 0)


def _section(header: str, title: str) -> str:
    found = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", header, re.M | re.S)
    return found[1] if found else ""


def parse(text: str) -> Module:
    """Read a module. Raises ValueError for a text that has no entry computation."""
    computations, entry, name, lines = {}, None, None, []
    header = []
    for line in text.splitlines():
        if name is None:
            if begins := _COMPUTATION.match(line):
                name, lines = begins[2], []
                entry = name if begins[1] else entry
            else:
                header.append(line)
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(lines))
            name = None
        elif instruction := _instruction(line):
            lines.append(instruction)
    if entry is None:
        raise ValueError("this is not the text of a compiled module: it has no ENTRY")
    return Module(entry, computations, "\n".join(header))


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    line = _COMMENT.sub("", line) if "/*" in line else line
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else _SHAPE.match(rest).end()
    result, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    inside = rest[len(op) : len(op) + _closing(rest[len(op) :])]
    operands = () if op in ("constant", "parameter") else tuple(_NAME.findall(inside))
    shapes = tuple(_shape(*found) for found in _SHAPE.findall(result))
    return Instruction(head[2], op, shapes, result.startswith("("), operands, rest, bool(head[1]))


def _closing(text: str) -> int:
    """Where the parenthesis that a text begins with is closed."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


@functools.cache
def _shape(dtype: str, sizes: str, layout: str) -> Shape:
    numbers = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size.strip())
    order, _, rest = layout.partition(":")
    order = tuple(int(axis) for axis in order.split(",") if axis)
    tile = re.search(r"T\(([\d,]*)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    tile = tuple(int(side) for side in tile[1].split(",")) if tile else ()
    return Shape(dtype, numbers, order, tile, int(space[1]) if space else 0)


@dataclasses.dataclass(frozen=True)
class Run:
    """A computation and how often it runs in one execution of the program."""

    computation: Computation
    times: float


def runs(module: Module, *, rare: float = 1.0) -> Iterator[Run]:
    """The entry and the bodies of loops, branches and calls in it, nested ones multiplied out.

    Of a conditional the branch with most instructions runs ``rare`` of the times and the next one
    the others. What is fused is not listed: it is one instruction of the computation it runs in.
    A loop whose count is not known counts once.
    """

    def walk(name: str, times: float) -> Iterator[Run]:
        computation = module.computations[name]
        yield Run(computation, times)
        for each in computation.instructions:
            if each.op == "while":
                trips = module.trips(computation, each)
                yield from walk(each.called[0], times * (1 if trips is None else trips))
            elif each.op == "conditional":
                branches = sorted(each.called, key=module.size, reverse=True)
                for part, share in zip(branches, (rare, 1 - rare), strict=False):
                    if share:
                        yield from walk(part, times * share)
            elif each.op == "call":
                yield from walk(each.called[0], times)

    yield from walk(module.entry, 1.0)
