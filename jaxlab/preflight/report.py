"""What a preflight found, as data for a file and as text for people."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxlab.preflight.analysis import Analysis, fits_in_words
from jaxlab.preflight.chips import GIB, Topology
from jaxlab.preflight.roofline import Prices, Speed, speed
from jaxlab.preflight.search import Tried

_PERCENT = "{:.1%}".format


def speeds(found: Analysis, where: Topology, prices: Prices | None) -> dict[str, Speed]:
    """What the pod does at the two step times between which the bounds lie."""
    chip_hour = prices.of(where.kind) if prices else None
    times = {"overlapped": found.roofline.least, "one after the other": found.roofline.sum}
    return {
        name: speed(
            seconds,
            where=where,
            model_flops=found.model_flops,
            tokens=found.tokens,
            steps=found.steps,
            chip_hour=chip_hour,
        )
        for name, seconds in times.items()
    }


def as_json(found: Analysis, where: Topology, prices: Prices | None = None) -> dict[str, Any]:
    """Everything that is known of one program, in bytes, seconds and FLOPs."""
    memory = found.memory
    report = {
        "program": found.program,
        "topology": where.name,
        "slices": where.slices,
        "chips": where.chips,
        "mesh": found.mesh,
        "fits": memory.fits,
        "memory": {
            "by": memory.by,
            "bytes": memory.total,
            "available": memory.available,
            "kinds": memory.kinds,
            "largest": [dataclasses.asdict(one) for one in memory.largest],
        },
        "flops": dataclasses.asdict(found.flops) | {"model": found.model_flops},
        "tokens": found.tokens,
        "steps": found.steps,
        "compile_seconds": found.compile_seconds,
        "refusal": found.refusal,
        "not_counted": list(found.unknown),
    }
    if found.roofline is None:
        return report
    kept = ("kind", "axes", "size", "count", "bytes", "sent")
    return report | {
        "roofline": {
            **dataclasses.asdict(found.roofline),
            "limit": found.roofline.limit,
            "least": found.roofline.least,
            "sum": found.roofline.sum,
        },
        "compiled_flops_of_a_chip": found.compiled_flops,
        "hbm_traffic_of_a_chip": found.hbm_bytes,
        "collectives": [{key: getattr(one, key) for key in kept} for one in found.collectives],
        "interconnect_seconds": found.interconnect,
        "speed": {n: dataclasses.asdict(s) for n, s in speeds(found, where, prices).items()},
        "prices": prices and {"date": prices.date, "currency": prices.currency},
    }


def tried_as_json(tried: list[Tried]) -> list[dict[str, Any]]:
    """Candidates that were compiled: what they change and what it gives."""
    return [
        {
            "changes": list(one.candidate.changes),
            "mesh": one.analysis.mesh,
            "fits": one.analysis.memory.fits,
            "bytes": one.analysis.memory.total,
            "least": one.analysis.roofline and one.analysis.roofline.least,
            "sum": one.analysis.roofline and one.analysis.roofline.sum,
            "compile_seconds": one.analysis.compile_seconds,
        }
        for one in tried
    ]


def show(
    found: Analysis, where: Topology, prices: Prices | None, console: Console | None = None
) -> None:
    """Print what a preflight found."""
    out = console or _console()
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1)
    out.print(f"[bold]{found.program}[/bold] on {where}, {mesh or 'one device'}")
    out.print(f"{fits_in_words(found.memory)}; compiled in {found.compile_seconds:.0f} s")
    if found.refusal:
        out.print(f"the compiler refuses it: {found.refusal[:300]}")
    _show_memory(found, out)
    if found.roofline is None:
        return
    _show_collectives(found, out)
    roofline = found.roofline
    out.print(
        f"seconds of a step, each alone at its peak: compute {roofline.compute:.4g}, "
        f"HBM {roofline.memory:.4g}, interconnect {roofline.interconnect:.4g}: "
        f"bound by {roofline.limit}"
    )
    again = found.flops.total / found.model_flops - 1
    out.print(
        f"FLOPs of a step: {found.flops.total:.4g} ({found.flops.kernels:.3g} in kernels), the "
        f"model's {found.model_flops:.4g}, computed again {_PERCENT(again)}"
    )
    _show_speeds(found, where, prices, out)
    for name in found.unknown:
        out.print(f"not counted: {name}")


def _console() -> Console:
    """As wide as the terminal; a file has lines as long as they are."""
    out = Console(highlight=False, soft_wrap=True)
    return out if out.is_terminal else Console(highlight=False, width=140)


def _show_memory(found: Analysis, out: Console) -> None:
    table = Table("bytes of a chip", "GiB", box=None)
    table.columns[1].justify = "right"
    for kind, size in found.memory.kinds.items():
        if size:
            table.add_row(kind, f"{size / GIB:.3f}")
    out.print(table)
    if found.memory.largest:
        table = Table("largest temporaries", "GiB", "kind", "traced at", box=None)
        for one in found.memory.largest[:6]:
            table.add_row(one.shape, f"{one.bytes / GIB:.3f}", one.kind, one.source)
        out.print(table)


def _show_collectives(found: Analysis, out: Console) -> None:
    if not found.collectives:
        return
    table = Table("collectives of a step", "over", "of", "count", "GiB", "GiB sent", box=None)
    for one in found.collectives[:10]:
        sizes = (f"{one.bytes / GIB:.3f}", f"{one.sent / GIB:.3f}")
        table.add_row(one.kind, one.axes, str(one.size), f"{one.count:g}", *sizes)
    out.print(table)


def _show_speeds(found: Analysis, where: Topology, prices: Prices | None, out: Console) -> None:
    table = Table("if all is", "s a step", "tokens/s", "MFU", "hours", box=None)
    if prices:
        table.add_column(f"{prices.currency}, prices of {prices.date}")
    for name, one in speeds(found, where, prices).items():
        hours = f"{one.run_hours:,.1f}" if found.steps else "-"
        row = [name, f"{one.step_seconds:.4g}", f"{one.tokens_per_second:,.0f}", _PERCENT(one.mfu)]
        table.add_row(*row, hours, *([f"{one.cost:,.0f}"] if prices else []))
    out.print(table)


def show_tried(title: str, tried: list[Tried], console: Console | None = None) -> None:
    """Print the candidates that fit, the best first."""
    out = console or _console()
    table = Table(title, "GiB", "least s", "sum s", box=None)
    for one in tried:
        roofline = one.analysis.roofline
        times = (f"{roofline.least:.4g}", f"{roofline.sum:.4g}") if roofline else ("-", "-")
        changes = " ".join(one.candidate.changes) or "as given"
        table.add_row(changes, f"{one.analysis.memory.total / GIB:.2f}", *times)
    out.print(table)
