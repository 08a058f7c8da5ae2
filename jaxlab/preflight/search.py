"""Other meshes, remat policies and micro-batches: ranked by estimate, the best ones compiled."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxlab.config import ExperimentConfig, MeshConfig
from jaxlab.errors import ConfigError
from jaxlab.preflight.analysis import Analysis, analyse
from jaxlab.preflight.chips import Topology
from jaxlab.preflight.estimate import Estimate, estimate
from jaxlab.sharding.mesh import check_batch_fits, check_model_fits, make_mesh

REMAT = ("none", "dots", "full")
# The estimate may be wrong by so much of a chip's memory: what is a little too large is tried.
_SLACK = 1.15
Compile = Callable[[ExperimentConfig], Analysis]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A configuration that differs from the given one by ``changes``, as ``--set`` takes them."""

    changes: tuple[str, ...]
    config: ExperimentConfig
    estimate: Estimate


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate that was compiled."""

    candidate: Candidate
    analysis: Analysis


def candidates(
    config: ExperimentConfig, where: Topology, devices: Sequence[Any], stage: str
) -> list[Candidate]:
    """Everything that divides, by estimated time (nothing overlapping), the given one included."""
    found = []
    for mesh in _meshes(config, where, devices):
        for accumulation in _accumulations(config.stages.named()[stage].batch_size):
            for remat in REMAT:
                changed = _with(config, stage, mesh=mesh, accumulation=accumulation, remat=remat)
                if changed is None or not _batch_fits(changed, devices, stage):
                    continue
                changes = _changes(config, changed, stage)
                found.append(Candidate(changes, changed, estimate(changed, where, stage)))
    return sorted(found, key=lambda one: (one.estimate.roofline.sum, len(one.changes)))


def _meshes(
    config: ExperimentConfig, where: Topology, devices: Sequence[Any]
) -> Iterator[MeshConfig]:
    chips = where.chips // where.slices
    given = config.mesh
    for tensor in (n for n in range(1, chips + 1) if chips % n == 0):
        for fsdp in (n for n in range(1, chips // tensor + 1) if chips // tensor % n == 0):
            data = chips // tensor // fsdp
            mesh = MeshConfig(replica=where.slices, data=data, fsdp=fsdp, tensor=tensor)
            try:
                check_model_fits(make_mesh(mesh, devices), config.model)
            except ConfigError:
                continue
            # The mesh that was given keeps its own words, so that it is no change.
            yield given if _same(given, mesh, where.chips) else mesh


def _same(given: MeshConfig, mesh: MeshConfig, chips: int) -> bool:
    from jaxlab.sharding.mesh import mesh_sizes

    try:
        return mesh_sizes(given, chips) == mesh_sizes(mesh, chips)
    except ConfigError:
        return False


def _accumulations(batch: int) -> list[int]:
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if batch % n == 0]


def _with(
    config: ExperimentConfig, stage: str, *, mesh: MeshConfig, accumulation: int, remat: str
) -> ExperimentConfig | None:
    changed = dataclasses.replace(config.stages.named()[stage], accumulation=accumulation)
    return dataclasses.replace(
        config,
        mesh=mesh,
        model=dataclasses.replace(config.model, remat=remat),
        stages=dataclasses.replace(config.stages, **{stage: changed}),
    )


def _batch_fits(config: ExperimentConfig, devices: Sequence[Any], stage: str) -> bool:
    one = config.stages.named()[stage]
    mesh = make_mesh(config.mesh, devices)
    try:
        check_batch_fits(mesh, "batch_size", one.batch_size // one.accumulation)
    except ConfigError:
        return False
    return True


def _changes(given: ExperimentConfig, changed: ExperimentConfig, stage: str) -> tuple[str, ...]:
    found = []
    if changed.mesh != given.mesh:
        sizes = dataclasses.asdict(changed.mesh)
        inside = ", ".join(f"{axis}: {size}" for axis, size in sizes.items())
        found.append(f"mesh={{{inside}}}")
    if changed.model.remat != given.model.remat:
        found.append(f"model.remat={changed.model.remat}")
    ours, theirs = (c.stages.named()[stage].accumulation for c in (changed, given))
    if ours != theirs:
        found.append(f"stages.{stage}.accumulation={ours}")
    return tuple(found)


def search(
    config: ExperimentConfig,
    where: Topology,
    devices: Sequence[Any],
    stage: str,
    *,
    best: int = 4,
    minutes: float = 10.0,
    report: Callable[[str], None] = print,
) -> list[Tried]:
    """Compile the most promising candidates; those that fit, the shortest step first.

    No compile begins after ``minutes``.
    """
    ranked = candidates(config, where, devices, stage)
    promising = [one for one in ranked if one.estimate.bytes <= _SLACK * where.chip.hbm_bytes]
    report(f"search: {len(ranked)} candidates, {len(promising)} may fit; compiling the best")
    tried = _compile(
        promising, _compiler(where, devices, stage), enough=best, minutes=minutes, report=report
    )
    fitting = [one for one in tried if one.analysis.memory.fits]
    return sorted(fitting, key=lambda one: one.analysis.roofline.sum)


def cures(
    config: ExperimentConfig,
    where: Topology,
    devices: Sequence[Any],
    stage: str,
    *,
    minutes: float = 10.0,
    report: Callable[[str], None] = print,
) -> list[Tried]:
    """The three cheapest changes that make a program fit which does not, each compiled.

    Those that change least come first, and of these the shortest steps by estimate. What holds all
    changes of another cure is none.
    """
    ranked = candidates(config, where, devices, stage)
    ranked.sort(key=lambda one: len(one.changes))
    promising = [
        one for one in ranked if one.changes and one.estimate.bytes <= _SLACK * where.chip.hbm_bytes
    ]
    report(f"it does not fit: trying the cheapest of {len(promising)} changes that may mend it")
    compiler = _compiler(where, devices, stage)
    tried = _compile(promising, compiler, enough=3, minutes=minutes, report=report, minimal=True)
    fitting = [one for one in tried if one.analysis.memory.fits]
    return sorted(fitting, key=lambda one: one.analysis.roofline.sum)


def _compiler(where: Topology, devices: Sequence[Any], stage: str) -> Compile:
    return lambda config: analyse(config, where, devices, mode="train", stage=stage)


def _compile(
    promising: Sequence[Candidate],
    compiler: Compile,
    *,
    enough: int,
    minutes: float,
    report: Callable[[str], None],
    minimal: bool = False,
) -> list[Tried]:
    """Compile in order until ``enough`` fit, at most twice as many."""
    tried: list[Tried] = []
    fitting: list[Tried] = []
    begun = time.monotonic()
    for one in promising:
        late = time.monotonic() - begun > 60 * minutes
        if late or len(fitting) == enough or len(tried) == 2 * enough:
            break
        if minimal and any(set(cure.candidate.changes) <= set(one.changes) for cure in fitting):
            continue
        analysis = compiler(one.config)
        tried.append(Tried(one, analysis))
        fits = analysis.memory.fits
        fitting += [tried[-1]] * fits
        what = " ".join(one.changes) or "as given"
        report(f"  {what}: {'fits' if fits else 'does not fit'}, {analysis.compile_seconds:.0f} s")
    return tried
