"""Reading a whole bank back against the checksums in its header."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jaxlab.memory.header import Header, StoredFile
from jaxlab.memory.objects import reason


@dataclass(frozen=True)
class VerifyReport:
    """What ``Bank.verify`` found; ``problems`` has one line for each bad file."""

    shards: int
    references: int
    bytes: int
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when every object is there and unchanged."""
        return not self.problems


def verify_objects(kvstore: Any, header: Header) -> VerifyReport:
    """Compare every object that ``header`` lists with its size and SHA-256."""
    tasks = header.objects()
    damaged, missing, problems = {}, {}, []
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda task: _problem(kvstore, *task[1:]), tasks)
        for (owner, key, _), wrong in zip(tasks, found, strict=True):
            if wrong:
                name = owner.removeprefix("shard ")
                (missing if wrong == "missing" else damaged)[name] = True
                problems.append(f"{owner}: {key} is {wrong}")
    return VerifyReport(
        shards=len(header.shards),
        references=header.rows,
        bytes=sum(record.bytes for _, _, record in tasks),
        damaged=tuple(damaged),
        missing=tuple(missing),
        problems=tuple(problems),
    )


def _problem(kvstore: Any, key: str, record: StoredFile) -> str:
    try:
        found = kvstore.read(key).result()
    except Exception as error:  # drivers raise many kinds; all mean the same here
        return f"unreadable ({reason(error)})"
    if found.state == "missing":
        return "missing"
    if len(found.value) != record.bytes:
        return f"damaged: {len(found.value)} bytes, expected {record.bytes}"
    return "" if StoredFile.of(found.value) == record else "damaged: another SHA-256"
