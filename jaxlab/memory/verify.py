"""Reading a whole bank back against the checksums in its header."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jaxlab.memory.header import Header, LostShard, Shard, StoredFile
from jaxlab.memory.objects import reason

UNREADABLE = "unreadable"


@dataclass(frozen=True)
class VerifyReport:
    """What ``Bank.verify`` found; ``problems`` has one line for each bad file, ``keys`` its place.

    ``unreadable`` is what may be sound and cannot be read now (permissions, a store that does not
    answer). ``cold`` references have no memory yet. ``lost`` shards were set aside by a repair;
    their files are not looked at.
    """

    shards: int
    references: int
    bytes: int
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    problems: tuple[str, ...]
    keys: tuple[str, ...] = ()
    cold: int = 0
    lost: tuple[LostShard, ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when every object that is in use is there and unchanged."""
        return not self.problems


@dataclass(frozen=True)
class RepairReport:
    """What ``Bank.repair`` did; ``lost`` has one line for each shard that was set aside.

    ``forgotten`` memories of cold shards will be encoded again; ``index_gone``: the index was of
    rows that are lost now, and has to be made again; ``problems`` are left.
    """

    repaired: tuple[str, ...]
    set_aside: tuple[str, ...]
    lost: tuple[str, ...]
    forgotten: int
    index_gone: bool
    problems: tuple[str, ...]


def verify_objects(
    kvstore: Any,
    header: Header,
    check_lone: Callable[[Shard], tuple[int, list[tuple[int, str, str]]]],
) -> VerifyReport:
    """Compare every object that ``header`` lists with its size and SHA-256.

    ``check_lone`` reads the memories of a cold shard, which the header does not list.
    """
    tasks = header.objects()
    found = []
    with ThreadPoolExecutor(4) as pool:
        wrong = pool.map(
            lambda task: problem_of(kvstore, task[1], lambda content: _trouble(content, task[2])),
            tasks,
        )
        found += [(*task[:2], problem) for task, problem in zip(tasks, wrong, strict=True)]
    cold, bad = 0, {owner for owner, _, problem in found if problem}
    for shard in header.shards:
        # What lies in a damaged shard is not read: it is bad anyhow.
        if shard.cold and f"shard {shard.name}" not in bad:
            encoded, wrong = check_lone(shard)
            cold += shard.count - encoded
            found += [(f"shard {shard.name}", key, problem) for _, key, problem in wrong]
    found = [each for each in found if each[2]]
    names = {"missing": {}, "damaged": {}, UNREADABLE: {}}
    for owner, _, problem in found:
        kind = next(kind for kind in names if problem.startswith(kind))
        names[kind][owner.removeprefix("shard ")] = True
    return VerifyReport(
        shards=len(header.shards),
        references=sum(shard.count for shard in header.shards),
        bytes=sum(record.bytes for _, _, record in tasks),
        damaged=tuple(names["damaged"]),
        missing=tuple(names["missing"]),
        problems=tuple(f"{owner}: {key} is {problem}" for owner, key, problem in found),
        keys=tuple(key for _, key, _ in found),
        cold=cold,
        lost=header.lost,
        unreadable=tuple(names[UNREADABLE]),
    )


def problem_of(kvstore: Any, key: str, trouble: Callable[[bytes], str]) -> str:
    """What is wrong with an object: missing, unreadable, or what ``trouble`` says of its bytes."""
    try:
        found = kvstore.read(key).result()
    except Exception as error:  # drivers raise many kinds; none says anything of the bytes
        return f"{UNREADABLE} ({reason(error)})"
    return "missing" if found.state == "missing" else trouble(found.value)


def _trouble(content: bytes, record: StoredFile) -> str:
    if len(content) != record.bytes:
        return f"damaged: {len(content)} bytes, expected {record.bytes}"
    return "" if StoredFile.of(content) == record else "damaged: another SHA-256"
