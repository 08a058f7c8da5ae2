"""Making damaged shards of a bank again from what is sound of them."""

import collections
import dataclasses
import textwrap
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.embedders import Embedder, ModelEmbed
from jaxlab.memory.header import LostShard, Shard, StoredFile
from jaxlab.memory.shards import REFERENCES, StoredReference, mend_line
from jaxlab.memory.store import Bank
from jaxlab.memory.verify import UNREADABLE, Finding, RepairReport, VerifyReport

Encode = Callable[[Sequence[StoredReference]], np.ndarray]
Texts = Sequence[StoredReference | None]
# In the place of a reference that is lost, whose row is deleted.
_LOST = StoredReference("", "", 0)


@dataclasses.dataclass(frozen=True)
class _Damage:
    """What is bad of a shard, by places within its folder, and what cannot be had again for it.

    ``texts`` are those of a shard with damaged ones, read once: what is lost is decided by them.
    """

    shard: Shard
    bad: frozenset[str]
    lost: np.ndarray  # rows, counted within the shard
    texts: Texts | None = None

    @property
    def beyond(self) -> bool:
        """Whether nothing of the shard can be had again."""
        return len(self.lost) == self.shard.count

    @property
    def lone(self) -> set[str]:
        """Memories of a cold shard, each of which can be forgotten alone."""
        return {path for path in self.bad if path not in self.shard.files}

    @property
    def to_make(self) -> bool:
        """Whether the shard is written anew."""
        return bool(self.bad) and not self.beyond and self.bad != self.lone

    def is_sound(self, name: str) -> bool:
        """Whether every object of an array is."""
        return not any(path.startswith(f"{name}/") for path in self.bad)


def repair(
    bank: Bank,
    *,
    encode: Encode | None = None,
    model_embed: ModelEmbed | None = None,
    set_aside: bool = False,
) -> RepairReport:
    """Make damaged shards again from what is sound of them; ``set_aside`` what cannot be.

    Where a text is sound, all else of its reference follows from it: memories by ``encode``
    (:func:`jaxlab.memory.pipeline.reference_encoder`). With ``set_aside`` a reference whose text is
    damaged is deleted, and a shard without any that is sound is read no more: its rows count as
    deleted, its files stay until the bank is compacted, and an index that they are in goes. A
    damaged memory of a cold shard is forgotten, to be encoded when it is next read.

    Raises BankError, and changes nothing, when something cannot be read now, which is no damage,
    when references are lost and may not be set aside, and when the codec or the list of deleted
    rows is damaged: then nothing is known.
    Raises ConfigError, and changes nothing, when a shard with sound texts takes the ``encode`` or
    the ``model_embed`` that is not given.
    """
    bank.require_writable()
    found = bank.verify()
    _require_readable(bank, found.findings)
    _require_known(bank, found)
    # What the embedder was fitted to may be damaged as well.
    embeds = all(each.owner != "embedder" for each in found.findings)
    every = _damages(bank, found, embeds=embeds)
    alive = bank.alive()
    alive = np.ones(bank.rows, bool) if alive is None else alive.copy()
    lost = [told for each in every if (told := _told(bank, each, alive))]
    if lost and not set_aside:
        raise _not_given_up(bank, lost, embeds=embeds)
    embedder = _means(bank, every, encode, model_embed)
    aside, repaired, forgotten, shards = [], [], [], []
    for each in every:
        shard = each.shard
        if each.beyond:
            living = int(alive[shard.start : shard.start + shard.count].sum())
            aside.append(LostShard(shard.name, shard.start, shard.count, living))
            continue
        if each.to_make:
            alive[shard.start + each.lost] = False
            shard = _make_again(bank, each, encode, embedder, bank.next_number + len(repaired))
            repaired.append(each.shard.name)
        elif each.bad:
            forgotten.append(each)
        shards.append(shard)
    index = bank.index_record
    if repaired or aside:
        changes: dict[str, Any] = {"lost": (*bank.lost, *aside)}
        if any(len(each.lost) and not each.beyond for each in every):
            changes["deleted_file"] = bank.store_deleted(alive)
        bank.exchange(shards, **changes)
    for each in forgotten:
        bank.forget(each.shard, each.lone)
    index_gone = bank.index_record != index
    return RepairReport(
        repaired=tuple(repaired),
        set_aside=tuple(each.name for each in aside),
        lost=tuple(lost),
        forgotten=sum(len(each.lone) for each in forgotten),
        index_gone=index_gone,
        problems=tuple(
            f"{each}: {each.cure}"
            for each in found.findings
            if not (each.owner.startswith("shard ") or each.owner == "index" and index_gone)
        ),
    )


def _require_readable(bank: Bank, findings: Sequence[Finding]) -> None:
    for each in findings:
        if each.trouble.kind == UNREADABLE:
            raise BankError(
                f"bank {bank.url}: {each}, which may be no damage; nothing was changed: {each.cure}"
            )


def _require_known(bank: Bank, found: VerifyReport) -> None:
    for each in found.findings:
        if each.owner in ("codec", "deleted"):
            raise BankError(
                f"bank {bank.url}: {each}, and it cannot be made again; nothing was changed:"
                f" {each.cure}"
            )


def _damages(bank: Bank, found: VerifyReport, *, embeds: bool) -> list[_Damage]:
    """Every shard, in order, with what is bad of it."""
    bad_of = collections.defaultdict(set)
    for each in found.findings:
        if each.owner.startswith("shard "):
            _, name, path = each.key.split("/", 2)
            bad_of[name].add(path)
    out = []
    for shard in bank.shards:
        damage = _Damage(shard, frozenset(bad_of[shard.name]), np.arange(0))
        if not (embeds or damage.is_sound("embeddings")):
            damage = dataclasses.replace(damage, lost=np.arange(shard.count))
        elif REFERENCES in damage.bad:
            texts = _texts(bank, damage)
            gone = np.flatnonzero([text is None for text in texts])
            damage = dataclasses.replace(damage, lost=gone, texts=texts)
        out.append(damage)
    return out


def _texts(bank: Bank, damage: _Damage) -> Texts:
    """The references of a shard with damaged texts; None in the place of one that is damaged."""
    shard = damage.shard
    content = bank.found_object_of(shard, REFERENCES)
    if content is None or not damage.is_sound("lines"):
        return [None] * shard.count
    table = bank.array_of(shard, "lines").tolist()
    lines = [content[start : start + length] for start, length, _ in table]
    sums = [crc for _, _, crc in table]
    lines = _mended(lines, sums, shard.files[REFERENCES]) or lines
    return [
        StoredReference.from_line(line) if zlib.crc32(line) == crc else None
        for line, crc in zip(lines, sums, strict=True)
    ]


def _mended(lines: Sequence[bytes], sums: Sequence[int], written: StoredFile) -> list[bytes] | None:
    """The lines as they were written, if no more than a bit of each was changed."""
    if sum(map(len, lines)) != written.bytes:
        return None
    out = []
    for line, crc in zip(lines, sums, strict=True):
        out.append(mend_line(line, crc))
        if zlib.crc32(out[-1]) != crc:  # then the whole is not what was written, whatever follows
            return None
    # A checksum of 32 bits may fit another change by chance.
    return out if StoredFile.of(b"".join(out)) == written else None


def _told(bank: Bank, damage: _Damage, alive: np.ndarray) -> str:
    """What is lost of a shard: every row, and of what it was as far as that can be read."""
    shard = damage.shard
    rows = damage.lost[alive[shard.start + damage.lost]]
    if not len(rows):
        return ""
    named = f"shard {shard.name}: rows {_ranges((shard.start + rows).tolist())}"
    try:
        names, places = bank.sources_of(shard), bank.array_of(shard, "source")
    except BankError:
        return f"{named} of sources that cannot be read"
    return f"{named} of {', '.join(sorted({names[place] for place in places[rows]}))}"


def _ranges(rows: Sequence[int]) -> str:
    """Rising numbers in few words: "1, 3 to 5"."""
    begins = [row for row, before in zip(rows, (-2, *rows), strict=False) if row != before + 1]
    ends = [row for row, after in zip(rows, (*rows[1:], -2), strict=True) if row + 1 != after]
    pairs = zip(begins, ends, strict=True)
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in pairs)


def _not_given_up(bank: Bank, lost: Sequence[str], *, embeds: bool) -> BankError:
    more = f" (and those of {len(lost) - 1} shards more)" if len(lost) > 1 else ""
    want = "their texts" if embeds else "their texts, or of what the embedder was fitted to"
    first = textwrap.shorten(lost[0], 200, placeholder=" ...")
    return BankError(
        f"bank {bank.url}: {first}{more} cannot be made again, for want of {want}; nothing was"
        " changed: restore the files that `jaxlab memory verify` names from a copy, or give these"
        " rows up with --set-aside (in Python set_aside=True)"
    )


def _means(
    bank: Bank, every: Sequence[_Damage], encode: Encode | None, model_embed: ModelEmbed | None
) -> Embedder | None:
    """The embedder if it is needed; ConfigError where that or ``encode`` is needed and lacks."""
    to_make = [each for each in every if each.to_make]
    for each in to_make:
        if encode is None and not each.shard.cold and not each.is_sound(bank.spec.stored_name):
            # What can be had again, if not here and now, is not given up.
            raise ConfigError(
                f"bank {bank.url}: shard {each.shard.name} has damaged memories, which the model"
                " makes again from the texts: give --run RUN (in Python encode=); nothing was"
                " changed"
            )
    if all(each.is_sound("embeddings") for each in to_make):
        return None
    return bank.embedder(model_embed=model_embed)


def _make_again(
    bank: Bank, damage: _Damage, encode: Encode | None, embedder: Embedder | None, number: int
) -> Shard:
    """The shard, written anew under another name."""
    shard, sound, stored = damage.shard, damage.is_sound, bank.spec.stored_name
    if damage.texts is None:
        lines = bank.object_of(shard, REFERENCES).splitlines()
        references = [StoredReference.from_line(line) for line in lines]
    else:
        references = [text or _LOST for text in damage.texts]
    memories = cold = kept = None
    if sound("kept"):
        kept = bank.array_of(shard, "kept")
    if sound(stored) and not shard.cold:
        memories = bank.array_of(shard, stored)
    elif shard.cold and sound(stored) and sound("kept"):
        memories, cold = _sound_memories(bank, shard)
    elif not shard.cold:
        memories = encode(references)
    if sound("embeddings"):
        embeddings = bank.array_of(shard, "embeddings")
    else:
        embeddings = embedder.embed([reference.text for reference in references])
    return bank.store(
        memories, kept, embeddings, references, number=number, start=shard.start, cold=cold
    )


def _sound_memories(bank: Bank, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """The memories of a cold shard, and True where one is damaged or has not been encoded."""
    _, bad = bank.check_lone(shard)
    _require_readable(bank, [Finding(f"shard {shard.name}", key, why) for _, key, why in bad])
    rows = np.arange(shard.start, shard.start + shard.count)
    gone = [row for row, _, _ in bad]
    rows[gone] = -1
    found = bank.read_any(rows)
    found.cold[gone] = True
    return found.memories, found.cold
