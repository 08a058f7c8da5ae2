"""``python -m launch.pod COMMAND``: launch a run on machines that are not this one, or are."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.local import Local, LocalLauncher


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    # What is to be run stands behind the first "--", and is nobody's option.
    at = given.index("--") if "--" in given else len(given)
    arguments = _parser().parse_args(given[:at])
    arguments.run = given[at + 1 :]
    return arguments.call(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.pod", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    local = commands.add_parser("local", help="several processes on this machine")
    local.set_defaults(call=_local)
    local.add_argument("--processes", type=int, default=2)
    local.add_argument("--devices", type=int, default=4)
    local.add_argument("--restarts", type=int, default=10)
    local.add_argument("--healthy", type=float, default=600.0)
    local.add_argument("--grace", type=float, default=60.0)
    local.add_argument("--log-dir", type=Path)
    return parser


def _local(arguments: argparse.Namespace) -> int:
    run = Local(
        command=arguments.run,
        processes=arguments.processes,
        devices=arguments.devices,
        restarts=arguments.restarts,
        healthy=arguments.healthy,
        grace=arguments.grace,
        log_dir=arguments.log_dir,
    )
    return LocalLauncher(run).launch()


if __name__ == "__main__":
    sys.exit(main())
