"""Static figures of every kernel from the machine code that the TPU compiler writes.

``measure`` compiles in a process of its own. A *pass* is the sum over the hot regions of bundles
times visits, for one head where the op has heads that are alike; a bundle is one cycle if nothing
stalls, so all of this bounds the time from below.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kernels_pallas import dispatch, tpu_compiler
from kernels_pallas.cases import OPS, cases_of
from kernels_pallas.peers import PEERS


def _read(arguments: list[str], kernel: str, visits: Sequence[int]) -> dict:
    """Figures of the kernel that a child compiles.

    Raises:
      RuntimeError: the machine code is not of the shape that the visits describe.
    """
    out, dump = tpu_compiler.dump_in_child(["-m", "kernels_pallas.static_bench", *arguments])
    try:
        found = tpu_compiler.read_kernels(dump, kernel)
    finally:
        shutil.rmtree(dump)
    if len(found) != 1:
        raise RuntimeError(f"{arguments}: {len(found)} kernels are named like {kernel!r}, not one")
    hot = found[0].hot
    if len(hot) != len(visits):
        raise RuntimeError(
            f"{arguments}: {len(hot)} hot regions, but {len(visits)} visits are told"
        )
    return {
        "pass_bundles": sum(
            region.bundles * times for region, times in zip(hot, visits, strict=True)
        ),
        "regions": [
            {**dataclasses.asdict(region), "visits": times}
            for region, times in zip(hot, visits, strict=True)
        ],
        "vmem_bytes": found[0].vmem_bytes,
        **tpu_compiler.last_json(out),
    }


def measure_case(op: str, name: str, chip: str) -> dict:
    """One case of an op on one kind of chip."""
    case = cases_of(op)[name]
    return {
        "op": op,
        "case": name,
        "chip": chip,
        **_read(["case", chip, op, name], case.kernel, case.visits),
        "hbm_bytes": case.copied_bytes,
        "floor_bytes": case.floor_bytes,
        "bytes_over_floor": case.copied_bytes / case.floor_bytes,
    }


def measure_peer(number: int, chip: str) -> dict:
    """One public kernel on one kind of chip; its two regions are whole and cut blocks."""
    peer = PEERS[number]
    visits = peer.visits
    if peer.source == "jax":
        # Its one region masks every block.
        visits = (sum(visits),)
    row = {"chip": chip, **dataclasses.asdict(peer)}
    return {**row, **_read(["peer", chip, str(number)], peer.kernel, visits)}


# Which of our cases stands beside the public kernels: with memory, and without.
_COMPARED = {
    "forward": ("heads of 128", "heads of 128, no memory"),
    "backward": ("heads of 128 backward", "heads of 128, no memory, backward"),
}


def summary(rows: list[dict], peers: list[dict]) -> list[dict]:
    """Our attention's pass over the best public kernel's, by chip and direction."""
    ours = {(row["chip"], row["case"]): row for row in rows if row["op"] == "memory_attention"}
    found = []
    for chip in dict.fromkeys(peer["chip"] for peer in peers):
        for direction, names in _COMPARED.items():
            backward = direction == "backward"
            theirs = [p for p in peers if p["chip"] == chip and p["backward"] == backward]
            for name in names:
                if not theirs or (chip, name) not in ours:
                    continue
                best = min(theirs, key=lambda row: row["pass_bundles"])
                bundles = ours[chip, name]["pass_bundles"]
                found.append(
                    {
                        "chip": chip,
                        "direction": direction,
                        "case": name,
                        "pass_bundles": bundles,
                        "best_public_pass": best["pass_bundles"],
                        "best_public": f"{best['source']} {best['blocks']}",
                        "ratio": bundles / best["pass_bundles"],
                    }
                )
    return found


def static_report(chips: Sequence[str], log=print) -> dict:
    """Every case and every public kernel on some kinds of chips."""
    rows, peers, missing = [], [], []
    for chip in chips:
        for op in OPS:
            for name in cases_of(op):
                rows.append(measure_case(op, name, chip))
                log(f"{chip} {op} {name}: {rows[-1]['pass_bundles']} bundles a pass")
        for number, peer in enumerate(PEERS):
            try:
                peers.append(measure_peer(number, chip))
            except RuntimeError as error:
                if "No module named 'tokamax'" not in str(error):
                    raise
                missing.append(f"{chip}: {peer.source} (pip install tokamax)")
                continue
            log(f"{chip} {peer.source} {peer.blocks}: {peers[-1]['pass_bundles']} bundles a pass")
    return {"static": summary(rows, peers), "rows": rows, "peers": peers, "missing": missing}


def _child(arguments: list[str]) -> None:
    """Compile what the arguments name and print what the compiler says of memory."""
    kind, chip, *rest = arguments
    with dispatch.lowering_for("tpu", chip):
        if kind == "case":
            function, shapes = cases_of(rest[0])[rest[1]].build()
        else:
            function, shapes = PEERS[int(rest[0])].build()
        compiled = tpu_compiler.compile_for(chip, function, *shapes)
    found = {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        # Of the whole program: the kernel and what XLA puts around it.
        "program_bytes": compiled.cost_analysis()["bytes accessed"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    _child(sys.argv[1:])
