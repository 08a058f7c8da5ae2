"""Figures of the kernels: static ones from the TPU compiler anywhere, times where there is a GPU.

python -m kernels_pallas.bench --static v5e v5p v6e --json FILE
python -m kernels_pallas.bench --json FILE
"""

import argparse
import json
import sys
from pathlib import Path

from kernels_pallas.without_tpu import choose_cpu


def main() -> None:
    """Run the command line."""
    choose_cpu()
    from kernels_pallas import tpu_compiler  # imports jax, which reads what was chosen

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--static",
        nargs="+",
        metavar="CHIP",
        choices=sorted(tpu_compiler.TOPOLOGIES),
        help="compile for these chips (v5e, v5p, v6e) and read the machine code",
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write")
    args = parser.parse_args()
    if args.static:
        from kernels_pallas.static_bench import static_report

        report = static_report(args.static, log=lambda line: print(line, file=sys.stderr))
        report["command"] = f"python -m kernels_pallas.bench --static {' '.join(args.static)}"
    else:
        from kernels_pallas.gpu_bench import NoGPUError, gpu_report

        try:
            report = gpu_report(log=lambda line: print(line, file=sys.stderr))
        except NoGPUError as error:
            sys.exit(f"error: {error}")
        report["command"] = "python -m kernels_pallas.bench"
    args.json.parent.mkdir(parents=True, exist_ok=True)
    partial = args.json.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(args.json)


if __name__ == "__main__":
    main()
