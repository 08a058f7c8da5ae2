"""Looking after a bank: give back the room of deleted references, make damaged shards again."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.embedders import ModelEmbed
from jaxlab.memory.header import LostShard, Shard
from jaxlab.memory.shards import REFERENCES, StoredReference
from jaxlab.memory.store import Bank
from jaxlab.memory.verify import UNREADABLE, RepairReport

Encode = Callable[[Sequence[StoredReference]], np.ndarray]


def compact(bank: Bank, *, shard_references: int) -> int:
    """Rewrite shards without deleted references; how many shards were written.

    Neighbours that are small, or cold, are put together in shards of ``shard_references``; a shard
    that is whole stays as it is. Rows are numbered anew, in the same order: citations of the bank
    are of no use afterwards, its index goes, and readers have to open it again. All happens in one
    commit: a bank whose writer was killed is what it was.
    """
    bank.require_writable()
    alive = bank.alive()
    alive = np.ones(bank.rows, bool) if alive is None else alive
    shards, start, number, written = [], 0, bank.next_number, 0
    for run in _runs(bank, alive, shard_references):
        if isinstance(run, Shard):
            made = [dataclasses.replace(run, start=start)]
        else:
            made = []
            for first in range(0, len(run), shard_references):
                rows = run[first : first + shard_references]
                made.append(_rewrite(bank, rows, number=number + written, start=start + first))
                written += 1
        shards += made
        start += sum(shard.count for shard in made)
    if written or bank.alive() is not None:
        bank.exchange(shards, lost=(), deleted_file=None)
    return written


def _runs(bank: Bank, alive: np.ndarray, size: int) -> Iterator[Shard | np.ndarray]:
    """In the order of rows: shards that stay, and rows of neighbours that are put together."""
    pending: list[Shard] = []

    def merged() -> Iterator[Shard | np.ndarray]:
        whole = len(pending) == 1 and _is_whole(bank, pending[0], alive)
        if whole:
            yield pending[0]
        elif pending:
            rows = [s.start + np.flatnonzero(alive[s.start : s.start + s.count]) for s in pending]
            yield np.concatenate(rows)
        pending.clear()

    for shard in bank.shards:
        if shard.count >= size and _is_whole(bank, shard, alive):
            yield from merged()
            yield shard
        else:
            pending.append(shard)
    yield from merged()


def _is_whole(bank: Bank, shard: Shard, alive: np.ndarray) -> bool:
    """Whether it gives nothing back to rewrite a shard alone."""
    if not alive[shard.start : shard.start + shard.count].all():
        return False
    # Of a cold one the memories are put together once all of them are there.
    return not shard.cold or bank.encoded(shard).size < shard.count


def _rewrite(bank: Bank, rows: np.ndarray, *, number: int, start: int) -> Shard:
    found = bank.read(rows)
    return bank.store(
        found.memories,
        found.kept,
        bank.embeddings_of(rows),
        bank.references(rows),
        number=number,
        start=start,
        cold=found.cold if found.cold.any() else None,
    )


def repair(
    bank: Bank,
    *,
    encode: Encode | None = None,
    model_embed: ModelEmbed | None = None,
    set_aside: bool = False,
) -> RepairReport:
    """Make damaged shards again from what is sound of them; ``set_aside`` those that cannot be.

    With its texts sound a shard is made again: what else is damaged follows from them, memories by
    ``encode`` (:func:`jaxlab.memory.pipeline.reference_encoder`). A shard that is set aside is read
    no more and its rows count as deleted; its files stay until :func:`compact`, and an index that
    they are in goes. A damaged memory of a cold shard is forgotten, to be encoded when it is next
    read.

    Raises BankError, and changes nothing, when something cannot be read now, which is no damage,
    when a shard cannot be made again and may not be set aside, and when the codec or the list of
    deleted rows is damaged: then nothing is known.
    Raises ConfigError, and sets nothing aside, when a shard with sound texts takes the ``encode``
    or the ``model_embed`` that is not given.
    """
    bank.require_writable()
    found = bank.verify()
    _require_readable(bank, found.problems)
    broken = {*found.damaged, *found.missing}
    for owner in ("codec", "deleted"):
        if owner in broken:
            raise BankError(
                f"bank {bank.url}: the object {owner} is damaged and cannot be made again; restore"
                " it from a copy, or write the bank again"
            )
    bad_of = _bad_by_shard(found.keys)
    # What the embedder was fitted to may be damaged as well.
    embeds = "embedder" not in broken
    aside, lost = {}, []
    for shard in bank.shards:
        if _is_beyond(bad_of[shard.name], embeds=embeds):
            aside[shard.name] = LostShard(shard.name, shard.start, shard.count)
            lost.append(f"{aside[shard.name]} {_sources_told(bank, shard)}")
    if lost and not set_aside:
        raise _not_given_up(bank, lost)
    repaired, forgotten, shards = [], [], []
    for shard in bank.shards:
        if shard.name in aside:
            continue
        bad = bad_of[shard.name]
        lone = {path for path in bad if path not in shard.files}
        if bad and bad == lone:
            forgotten.append((shard, lone))
        elif bad:
            number = bank.next_number + len(repaired)
            repaired.append(shard.name)
            shard = _make_again(bank, shard, bad, encode, model_embed, number)
        shards.append(shard)
    index = bank.index_record
    if repaired or aside:
        bank.exchange(shards, lost=(*bank.lost, *aside.values()))
    for shard, lone in forgotten:
        bank.forget(shard, lone)
    index_gone = bank.index_record != index
    settled = ("shard ", "index: ") if index_gone else ("shard ",)
    left = tuple(line for line in found.problems if not line.startswith(settled))
    return RepairReport(
        repaired=tuple(repaired),
        set_aside=tuple(aside),
        lost=tuple(lost),
        forgotten=sum(len(lone) for _, lone in forgotten),
        index_gone=index_gone,
        problems=left,
    )


def _is_sound(bad: set[str], name: str) -> bool:
    return not any(path.startswith(f"{name}/") for path in bad)


def _is_beyond(bad: set[str], *, embeds: bool) -> bool:
    """Whether what is damaged of a shard follows from nothing that is there."""
    return REFERENCES in bad or not (embeds or _is_sound(bad, "embeddings"))


def _bad_by_shard(keys: Sequence[str]) -> Mapping[str, set[str]]:
    """What is bad in each shard, by its name: places within its folder."""
    found = collections.defaultdict(set)
    for key in keys:
        if key.startswith("shards/"):
            _, name, path = key.split("/", 2)
            found[name].add(path)
    return found


def _not_given_up(bank: Bank, lost: Sequence[str]) -> BankError:
    more = f" (and {len(lost) - 1} shards more)" if len(lost) > 1 else ""
    return BankError(
        f"bank {bank.url}: {lost[0]}{more} cannot be made again, for want of sound texts or the"
        " embedder; nothing was changed: restore the files that `jaxlab memory verify` names from"
        " a copy, or give these rows up with --set-aside (in Python set_aside=True)"
    )


def _make_again(
    bank: Bank,
    shard: Shard,
    bad: set[str],
    encode: Encode | None,
    model_embed: ModelEmbed | None,
    number: int,
) -> Shard:
    """The shard, written anew under another name."""
    spec, sound = bank.spec, functools.partial(_is_sound, bad)
    lines = bank.object_of(shard, REFERENCES).splitlines()
    references = [StoredReference.from_line(line) for line in lines]
    memories = cold = kept = None
    if sound("kept"):
        kept = bank.array_of(shard, "kept")
    if sound(spec.stored_name) and not shard.cold:
        memories = bank.array_of(shard, spec.stored_name)
    elif shard.cold and sound(spec.stored_name) and sound("kept"):
        memories, cold = _sound_memories(bank, shard)
    elif not shard.cold:
        if encode is None:
            # What can be had again, if not here and now, is not given up.
            raise ConfigError(
                f"bank {bank.url}: shard {shard.name} has damaged memories and sound texts, from"
                " which the model makes them again: give --run RUN (in Python encode=); nothing was"
                " set aside"
            )
        memories = encode(references)
    if sound("embeddings"):
        embeddings = bank.array_of(shard, "embeddings")
    else:
        embedder = bank.embedder(model_embed=model_embed)
        embeddings = embedder.embed([reference.text for reference in references])
    return bank.store(
        memories, kept, embeddings, references, number=number, start=shard.start, cold=cold
    )


def _sound_memories(bank: Bank, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """The memories of a cold shard, and True where one is damaged or has not been encoded."""
    _, bad = bank.check_lone(shard)
    _require_readable(bank, [f"{key} is {trouble}" for _, key, trouble in bad])
    rows = np.arange(shard.start, shard.start + shard.count)
    gone = [row for row, _, _ in bad]
    rows[gone] = -1
    found = bank.read_any(rows)
    found.cold[gone] = True
    return found.memories, found.cold


def _require_readable(bank: Bank, problems: Sequence[str]) -> None:
    for problem in problems:
        if f" is {UNREADABLE} (" in problem:
            raise BankError(
                f"bank {bank.url}: {problem}, which may be no damage; nothing was changed: mend"
                " the access, then repeat"
            )


def _sources_told(bank: Bank, shard: Shard) -> str:
    """Of what the references of a shard were, as far as that can be read."""
    try:
        names = bank.sources_of(shard)
    except BankError:
        return "of sources that cannot be read"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"of {', '.join(names[:5])}{more}"
