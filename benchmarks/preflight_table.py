"""What the paper's models take on three pods, compiled by the TPU compiler: no chip is needed.

    python benchmarks/preflight_table.py --json benchmarks/results/preflight.json

Every row is ``jaxlab preflight CONFIG --topology T --stage S --set ...``; rows that are in the file
already, for the same command, are kept.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxlab.tools.output import machine, write_json

# Configuration, stage, and the changes that each pod needs for it to fit.
ROWS = [
    ("configs/memory3_2b.yaml", "warmup"),
    ("configs/memory3_2b.yaml", "continual"),
    ("configs/memory3_0_9b.yaml", "continual"),
    ("configs/llama_229m_ire.yaml", "warmup"),
]
TOPOLOGIES = ("v5e-256", "v5p-128", "v6e-64")
CHANGES = {
    # 3200 numbers of width are not divided by 256.
    ("configs/memory3_2b.yaml", "v5e-256"): ["mesh.data=2", "mesh.fsdp=128"],
    # The paper's 480 rows are spread by no power of two over 32.
    **{("configs/llama_229m_ire.yaml", t): ["stages.warmup.batch_size=512"] for t in TOPOLOGIES},
}
# As it stands this does not fit: the row has the changes that make it fit, and one of them follows.
CURED = [
    "preflight configs/memory3_2b.yaml --topology v6e-64 --stage continual "
    "--set stages.continual.accumulation=2"
]


def commands() -> list[list[str]]:
    """The arguments of each row."""
    found = []
    for config, stage in ROWS:
        for topology in TOPOLOGIES:
            given = ["preflight", config, "--topology", topology, "--stage", stage]
            changes = CHANGES.get((config, topology), [])
            found.append(given + (["--set", *changes] if changes else []))
    return found + [shlex.split(command) for command in CURED]


def main() -> None:
    """Compile what is not there yet; the file is written after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", default="6", help="of looking for what would fit")
    args = parser.parse_args()
    before = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}
    done = {row["command"]: row for row in before["rows"]}
    rows = []
    for given in commands():
        command = shlex.join(["jaxlab", *given])
        if command not in done:
            print(command, file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "row.json"
                options = ["--minutes", args.minutes, "--json", str(file)]
                subprocess.run([sys.executable, "-m", "jaxlab.cli", *given, *options], check=False)
                if not file.exists():
                    sys.exit(f"{command}: failed")
                done[command] = {"command": command, **json.loads(file.read_text())}
        rows.append(done[command])
        packages = ("jax", "jaxlib", "libtpu")
        write_json(args.json, {"machine": machine(packages), "rows": rows})


if __name__ == "__main__":
    main()
