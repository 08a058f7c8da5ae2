"""Compile one program for a topology and read everything from it; nothing runs."""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlab.config import ExperimentConfig
from jaxlab.preflight import flops, hlo, memory, traffic
from jaxlab.preflight.chips import GIB, Topology
from jaxlab.preflight.collectives import Collective, collectives
from jaxlab.preflight.programs import Program, build
from jaxlab.preflight.roofline import Roofline, interconnect_seconds
from jaxlab.sharding.mesh import make_mesh
from kernels_pallas.dispatch import lowering_for


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What is known of one program on one topology.

    roofline is None where the compiler refused the program, and ``refusal`` has its words then.
    flops: of all chips; compiled_flops: what one chip computes, as compiled. unknown: kernels that
    state no cost, and loops whose number of rounds is not known and counts as one.
    """

    program: str
    mesh: dict[str, int]
    memory: memory.ChipMemory
    flops: flops.Flops
    model_flops: float
    tokens: int
    steps: int
    compile_seconds: float
    refusal: str | None = None
    roofline: Roofline | None = None
    compiled_flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    interconnect: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def analyse(
    config: ExperimentConfig,
    where: Topology,
    devices: Sequence[Any],
    *,
    mode: str,
    stage: str,
    rows: int | None = None,
) -> Analysis:
    """Build, trace, compile and read one program. Raises ConfigError for what cannot be built."""
    mesh = make_mesh(config.mesh, devices)
    begun = time.monotonic()
    program = build(config, mesh, mode=mode, stage=stage, rows=rows)
    with lowering_for("tpu", where.kind), jax.set_mesh(mesh):
        traced = program.step.trace(*program.arguments)
        lowered = traced.lower()
        counted = flops.count(traced, rare=program.rare)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _refused(program, where, mesh, counted, str(error), time.monotonic() - begun)
    seconds = time.monotonic() - begun
    return _read(program, where, mesh, counted, compiled, seconds)


def _read(
    program: Program,
    where: Topology,
    mesh: Mesh,
    counted: flops.Flops,
    compiled: jax.stages.Compiled,
    seconds: float,
) -> Analysis:
    module = hlo.parse(compiled.as_text())
    found = collectives(module, dict(mesh.shape), rare=program.rare)
    by_axes = interconnect_seconds(where, list(mesh.devices.flat), found)
    moved = traffic.memory_traffic(module, rare=program.rare)
    # What every chip computes alike is in the compiled program only.
    computed = traffic.compiled_flops(module, rare=program.rare)
    chip = where.chip
    roofline = Roofline(
        compute=max(computed, counted.total / where.chips) / chip.flops,
        memory=moved / chip.hbm_bandwidth,
        interconnect=sum(by_axes.values()),
    )
    return Analysis(
        program=program.name,
        mesh=dict(mesh.shape),
        memory=memory.read_memory(
            compiled,
            module,
            program.given,
            available=chip.hbm_bytes,
            slot_axes=program.slot_axes,
        ),
        flops=counted,
        model_flops=program.model_flops or counted.total,
        tokens=program.tokens,
        steps=program.steps,
        compile_seconds=seconds,
        roofline=roofline,
        compiled_flops=computed,
        hbm_bytes=moved,
        collectives=tuple(found),
        interconnect=by_axes,
        unknown=(*counted.unknown, *_endless(module)),
    )


def _endless(module: hlo.Module) -> list[str]:
    return [
        f"loop {each.name}"
        for run in hlo.runs(module)
        for each in run.computation.instructions
        if each.op == "while" and module.trips(run.computation, each) is None
    ]


def _refused(
    program: Program,
    where: Topology,
    mesh: Mesh,
    counted: flops.Flops,
    message: str,
    seconds: float,
) -> Analysis:
    return Analysis(
        program=program.name,
        mesh=dict(mesh.shape),
        memory=refused_memory(message, program.given, available=where.chip.hbm_bytes),
        flops=counted,
        model_flops=program.model_flops or counted.total,
        tokens=program.tokens,
        steps=program.steps,
        compile_seconds=seconds,
        refusal=" ".join(message.split("\n\n")[0].split()),
        unknown=counted.unknown,
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([KMGT]?)B?", text).groups()
    return int(float(number) * _UNITS[unit])


def refused_memory(message: str, given: dict[str, Any], *, available: float) -> memory.ChipMemory:
    """What the compiler's refusal tells of a program that does not fit.

    It names either what all temporaries take or what the whole program does, and sometimes the
    largest allocations with their lines.
    """
    kinds = dict.fromkeys(memory.KINDS, 0)
    kinds |= {kind: memory.shard_bytes(tree) for kind, tree in given.items()}
    arguments = sum(kinds.values())
    whole = re.search(r"Used ([\d.]+[KMGT]?) of", message)
    part = re.search(r"HLO temporaries \(([\d.]+[KMGT]?)\)", message)
    if part:
        kinds["other temporaries"] = _bytes(part[1])
    elif whole:
        kinds["other temporaries"] = max(_bytes(whole[1]) - arguments, 0)
    # Whatever it counted, the compiler found no room.
    total = max(arguments + kinds["other temporaries"], int(available) + 1)
    return memory.ChipMemory(
        kinds, total, int(available), tuple(_allocations(message)), by="the compiler's refusal"
    )


def _allocations(message: str) -> list[memory.Temporary]:
    found = []
    for block in re.split(r"\n\s+\d+\. ", message)[1:]:
        size = re.match(r"Size: ([\d.]+[KMGT]?)", block)
        if size is None:
            continue
        operator = re.search(r'op_name="([^"]*)"', block)
        source = re.search(r'source_file="([^"]*)" source_line=(\d+)', block)
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", block)
        place = memory.place([hlo.Frame(source[1], int(source[2]))] if source else [])
        op = operator[1] if operator else ""
        shape = shape[1] if shape else ""
        found.append(memory.Temporary(_bytes(size[1]), shape, "other temporaries", place, op))
    return found


def fits_in_words(found: memory.ChipMemory) -> str:
    """One phrase for people."""
    used, there = found.total / GIB, found.available / GIB
    if found.fits:
        return f"fits: {used:.2f} of {there:.2f} GiB a chip"
    return f"does not fit: {used:.2f} GiB are needed and a chip has {there:.2f}"
