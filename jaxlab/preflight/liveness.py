"""Which temporary arrays of a compiled program lie in main memory at once.

The text of a TPU program is its schedule, so that the moment at which most is alive can be found by
walking through it: a loop's carried arrays are alive while it runs, what is updated in place takes
no second copy, and results that go where a donated argument lay take none at all.
"""

import dataclasses
import re
from collections.abc import Iterable

from jaxlab.preflight.hlo import Computation, Instruction, Module

# Results that are their operand under another name.
_SAME = ("bitcast", "optimization-barrier", "opt-barrier", "add-dependency", "domain")


# What makes an array that a loop then fills.
_EMPTY = ("broadcast", "custom-call", "constant", "copy")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A temporary: its size in bytes, and the instruction whose result it is."""

    bytes: int
    shape: str
    instruction: Instruction


@dataclasses.dataclass(frozen=True)
class Peak:
    """The temporaries of the moment at which they take most, in bytes altogether."""

    bytes: int
    buffers: tuple[Buffer, ...]


# A value is a buffer's number (None: takes no memory of its own) or a list of values.
_Value = int | None | list


class _Walk:
    """One computation, in the order of its schedule."""

    def __init__(self, module: Module, computation: Computation, elsewhere: Iterable[int]):
        """``elsewhere``: the leaves of the result that have their memory already."""
        self.module, self.computation = module, computation
        self.values: dict[str, _Value] = {}
        self.buffers: list[Buffer] = []
        self.born: list[int] = []  # the place of each buffer's instruction
        self._last = _last_uses(computation)
        self._elsewhere = set(_made_at(computation, elsewhere))
        for place, each in enumerate(computation.instructions):
            self.values[each.name] = self._value(place, each)
            if each.op == "while":
                self._name_carried(each)

    def _name_carried(self, loop: Instruction) -> None:
        """A loop's array that is made empty belongs to the instruction that fills it."""
        body = self.module.computations[loop.called[0]]
        carried = self.values[loop.name]
        for leaf, number in enumerate(carried if isinstance(carried, list) else ()):
            if not isinstance(number, int):
                continue
            made = self.buffers[number].instruction
            ((name, _),) = _made_at(body, [leaf])
            filler = body.by_name[name]
            if made.op in _EMPTY and filler.op != "parameter" and filler.op_name:
                self.buffers[number] = dataclasses.replace(self.buffers[number], instruction=filler)

    def peak(self) -> Peak:
        """The moment at which most is alive."""
        begins, ends = {}, {}
        for number, end in self._buffer_ends().items():
            begins.setdefault(self.born[number], []).append(number)
            ends.setdefault(end, []).append(number)
        alive: set[int] = set()
        total, most = 0, Peak(0, ())
        for place, each in enumerate(self.computation.instructions):
            alive.update(begins.get(place, ()))
            total += sum(self.buffers[number].bytes for number in begins.get(place, ()))
            inner = self._inner(each)
            if total + inner.bytes > most.bytes:
                mine = tuple(self.buffers[number] for number in sorted(alive))
                most = Peak(total + inner.bytes, (*mine, *inner.buffers))
            alive.difference_update(ends.get(place, ()))
            total -= sum(self.buffers[number].bytes for number in ends.get(place, ()))
        return most

    def _value(self, place: int, each: Instruction) -> _Value:
        operands = [self.values.get(name) for name in each.operands]
        if each.op == "parameter":
            return [None] * len(each.shapes) if each.is_tuple else None
        if each.op == "constant":
            return None
        if each.op == "tuple":
            return operands
        if each.op == "get-tuple-element":
            index = int(each.attribute(r"index=(\d+)") or 0)
            return operands[0][index] if isinstance(operands[0], list) else None
        if each.op in _SAME or each.op == "while":
            return operands[0]
        if each.op.endswith(("-done", "-update")):
            return _result_of_started(self.computation.by_name[each.operands[0]], operands[0])
        if each.op.endswith("-start"):
            return self._started(place, each, operands)
        if each.op == "dynamic-update-slice":
            return operands[0]
        return self._fresh(place, each, operands)

    def _started(self, place: int, each: Instruction, operands) -> _Value:
        """(operands, results, context) of an asynchronous op; a copy has its result first."""
        if each.op == "copy-start":
            return [self._new(place, each, 0), operands[0], None]
        count = len(operands)
        if len(each.shapes) >= 2 * count:
            new = [self._new(place, each, count + i) for i in range(count)]
            return [operands[0] if count == 1 else operands, new[0] if count == 1 else new]
        return [self._new(place, each, 0)] * 2

    def _fresh(self, place: int, each: Instruction, operands) -> _Value:
        """New memory, but for the leaves that are written over an operand."""
        shared = _aliases(each)
        if each.op == "fusion":
            shared |= self._updated_in_place(each)
        found: list[_Value] = []
        for leaf in range(len(each.shapes)):
            value = operands[shared[leaf]] if leaf in shared else None
            found.append(
                value
                if leaf in shared and not isinstance(value, list)
                else self._reused(place, each, leaf, operands)
            )
        return found if each.is_tuple else found[0]

    def _updated_in_place(self, each: Instruction) -> dict[int, int]:
        inner = self.module.computations[each.called[0]]
        root = inner.root
        leaves = [inner.by_name[n] for n in root.operands] if root.op == "tuple" else [root]
        found = {}
        for number, leaf in enumerate(leaves):
            while leaf.op in ("bitcast", "dynamic-update-slice", "scatter") and leaf.operands:
                leaf = inner.by_name[leaf.operands[0]]
                if leaf.op == "parameter":
                    found[number] = int(leaf.attribute(r"parameter\((\d+)\)") or 0)
        same = {
            leaf: operand
            for leaf, operand in found.items()
            if self.computation.by_name[each.operands[operand]].shapes[0].stored_bytes
            == each.shapes[leaf].stored_bytes
        }
        return same

    def _reused(self, place: int, each: Instruction, leaf: int, operands) -> _Value:
        """The buffer of an operand that ends here, where the op writes element by element."""
        size = each.shapes[leaf].stored_bytes
        if (each.name, leaf) in self._elsewhere:
            return None
        elementwise = each.op in ("add", "multiply", "subtract", "select", "all-reduce")
        if elementwise or "kind=kLoop" in each.text:
            for name, value in zip(each.operands, operands, strict=True):
                ends = self._last.get(name) == place
                if ends and isinstance(value, int) and self.buffers[value].bytes == size:
                    return value
        return self._new(place, each, leaf)

    def _new(self, place: int, each: Instruction, leaf: int) -> int | None:
        shape = each.shapes[leaf]
        if shape.space or (each.name, leaf) in self._elsewhere:
            return None
        text = f"{shape.dtype}[{','.join(map(str, shape.sizes))}]"
        self.buffers.append(Buffer(shape.stored_bytes, text, each))
        self.born.append(place)
        return len(self.buffers) - 1

    def _buffer_ends(self) -> dict[int, int]:
        """The place of each buffer's last use, under whatever name."""
        last: dict[int, int] = {}
        for place, each in enumerate(self.computation.instructions):
            for number in _leaves(self.values[each.name]):
                last[number] = max(last.get(number, 0), place)
            for name in each.operands:
                for number in _leaves(self.values.get(name)):
                    last[number] = max(last.get(number, 0), place)
        for number in _leaves(self.values[self.computation.root.name]):
            last[number] = len(self.computation.instructions)
        return last

    def _inner(self, each: Instruction) -> Peak:
        if each.op == "while":
            body = self.module.computations[each.called[0]]
            return _Walk(self.module, body, range(len(each.shapes))).peak()
        if each.op in ("conditional", "call"):
            parts = [self.module.computations[name] for name in each.called]
            leaves = range(len(each.shapes))
            peaks = (_Walk(self.module, part, leaves).peak() for part in parts)
            return max(peaks, key=lambda peak: peak.bytes)
        return Peak(0, ())


def _leaves(value: _Value) -> Iterable[int]:
    if isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield value


def _result_of_started(start: Instruction, value: _Value) -> _Value:
    if not isinstance(value, list):
        return value
    return value[0] if start.op == "copy-start" else value[min(1, len(value) - 1)]


def _made_at(computation: Computation, leaves: Iterable[int]) -> Iterable[tuple[str, int]]:
    """The instructions, with the number of a leaf of theirs, that make these leaves of the root."""
    for leaf in leaves:
        each, at = computation.root, leaf
        while True:
            if each.op == "tuple":
                each, at = computation.by_name[each.operands[at]], 0
            elif each.op == "get-tuple-element":
                at = int(each.attribute(r"index=(\d+)") or 0)
                each = computation.by_name[each.operands[0]]
            elif each.op in _SAME:
                each = computation.by_name[each.operands[0]]
            elif each.op.endswith("-done"):
                each = computation.by_name[each.operands[0]]
                at = 0 if each.op == "copy-start" else 1
            else:
                break
        yield each.name, at


def _last_uses(computation: Computation) -> dict[str, int]:
    last = {}
    for place, each in enumerate(computation.instructions):
        for name in each.operands:
            last[name] = place
    return last


def _aliases(each: Instruction) -> dict[int, int]:
    """Leaves of a result that are written over an operand, as the compiler states."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\})\}", each.text)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", found[1]) if found else []
    return {int(leaf or 0): int(operand) for leaf, operand in pairs}


def peak_of(module: Module) -> Peak:
    """The temporaries of one chip at the moment at which they take most."""
    donated = re.search(r"input_output_alias=\{(.*?)\}, \w+=", module.header)
    leaves = re.findall(r"\{(\d+)\}: \(", donated[1]) if donated else []
    entry = module.computations[module.entry]
    return _Walk(module, entry, [int(leaf) for leaf in leaves]).peak()
