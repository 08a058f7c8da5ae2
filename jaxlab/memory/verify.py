"""Reading a whole bank back against the checksums in its header."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxlab.errors import BankError
from jaxlab.memory.header import Header, LostShard, Shard, StoredFile, cure_of
from jaxlab.memory.objects import reason

MISSING, DAMAGED, UNREADABLE = "missing", "damaged", "unreadable"


@dataclass(frozen=True)
class Trouble:
    """What is wrong with an object.

    ``kind`` is missing, damaged, or unreadable: what cannot be read now (permissions, a store that
    does not answer) may be sound.
    """

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


@dataclass(frozen=True)
class Finding:
    """A bad object: what it belongs to ("shard NAME", "codec", ...), its key and its trouble."""

    owner: str
    key: str
    trouble: Trouble

    @property
    def cure(self) -> str:
        """What to do about it."""
        if self.trouble.kind == UNREADABLE:
            return "mend the access, then repeat"
        if self.owner.startswith("shard "):
            return "`jaxlab memory repair` makes again what follows from what is sound"
        return cure_of(self.owner)

    def __str__(self) -> str:
        return f"{self.owner}: {self.key} is {self.trouble}"


@dataclass(frozen=True)
class VerifyReport:
    """What ``Bank.verify`` found.

    ``references`` are the living ones, and ``cold`` those of them that have no memory yet. ``lost``
    shards were set aside by a repair; their files are not looked at.
    """

    shards: int
    references: int
    bytes: int
    findings: tuple[Finding, ...]
    cold: int = 0
    lost: tuple[LostShard, ...] = ()

    @property
    def ok(self) -> bool:
        """True when every object that is in use is there and unchanged."""
        return not self.findings

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each bad object."""
        return tuple(map(str, self.findings))

    @property
    def missing(self) -> tuple[str, ...]:
        """Shards (by name) and other owners of objects that are not there."""
        return self._owners(MISSING)

    @property
    def damaged(self) -> tuple[str, ...]:
        """Shards (by name) and other owners of objects that are not what was written."""
        return self._owners(DAMAGED)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Shards (by name) and other owners of objects that cannot be read now."""
        return self._owners(UNREADABLE)

    def _owners(self, kind: str) -> tuple[str, ...]:
        found = (each.owner for each in self.findings if each.trouble.kind == kind)
        return tuple(dict.fromkeys(owner.removeprefix("shard ") for owner in found))


@dataclass(frozen=True)
class RepairReport:
    """What ``Bank.repair`` did; ``lost`` names the rows that were given up, a line for each shard.

    ``set_aside`` are shards of which nothing is left. ``forgotten`` memories of cold shards will be
    encoded again; ``index_gone``: the index was of rows that are lost now, and has to be made
    again; ``problems`` are left, each with its cure.
    """

    repaired: tuple[str, ...]
    set_aside: tuple[str, ...]
    lost: tuple[str, ...]
    forgotten: int
    index_gone: bool
    problems: tuple[str, ...]


# Rows of a cold shard, counted within it, that are encoded; and row, key and trouble of bad ones.
CheckedLone = tuple[Int[np.ndarray, " n"], Sequence[tuple[int, str, Trouble]]]


def verify_objects(
    kvstore: Any,
    header: Header,
    alive: Bool[np.ndarray, " rows"] | None,
    encoded: Callable[[Shard], Int[np.ndarray, " n"]],
    check_lone: Callable[[Shard], CheckedLone],
) -> VerifyReport:
    """Compare every object that ``header`` lists with its size and SHA-256.

    ``alive`` is False at deleted rows. ``encoded`` lists the memories of a cold shard, which the
    header does not, and ``check_lone`` reads them.
    """
    alive = np.ones(header.rows, bool) if alive is None else alive
    tasks = header.objects()
    with ThreadPoolExecutor(4) as pool:
        troubles = pool.map(
            lambda task: trouble_of(kvstore, task[1], lambda content: _damage(content, task[2])),
            tasks,
        )
        found = [
            Finding(owner, key, trouble)
            for (owner, key, _), trouble in zip(tasks, troubles, strict=True)
            if trouble is not None
        ]
    living = cold = 0
    bad = {each.owner for each in found}
    for shard in header.shards:
        rows = alive[shard.start : shard.start + shard.count]
        living += int(rows.sum())
        if shard.cold:
            wrong = []
            if f"shard {shard.name}" not in bad:
                there, wrong = check_lone(shard)
            else:
                # It is bad anyhow: what lies in it is counted as far as it can be, and not read.
                try:
                    there = encoded(shard)
                except BankError:
                    there = np.arange(0)
            cold += int(rows.sum() - rows[there].sum())
            found += [Finding(f"shard {shard.name}", key, trouble) for _, key, trouble in wrong]
    return VerifyReport(
        shards=len(header.shards),
        references=living,
        bytes=sum(record.bytes for _, _, record in tasks),
        findings=tuple(found),
        cold=cold,
        lost=header.lost,
    )


def trouble_of(kvstore: Any, key: str, damage: Callable[[bytes], Trouble | None]) -> Trouble | None:
    """What is wrong with an object; ``damage`` says it of its bytes."""
    try:
        found = kvstore.read(key).result()
    except Exception as error:  # drivers raise many kinds; none says anything of the bytes
        return Trouble(UNREADABLE, reason(error))
    return Trouble(MISSING) if found.state == "missing" else damage(found.value)


def _damage(content: bytes, record: StoredFile) -> Trouble | None:
    if len(content) != record.bytes:
        return Trouble(DAMAGED, f"{len(content)} bytes, expected {record.bytes}")
    return None if StoredFile.of(content) == record else Trouble(DAMAGED, "another SHA-256")
