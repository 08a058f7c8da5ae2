"""``python -m launch.pod COMMAND``: launch a run on machines that are not this one, or are.

Every command first makes a plan; with ``--dry-run`` it is printed and nothing is done.
"""

import argparse
import dataclasses
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import cloud_tpu, gke, slurm
from launch.accelerators import accelerator
from launch.cloud_tpu import Pod
from launch.local import Local, LocalLauncher, find_program, worker_environment
from launch.plan import LaunchError, Plan, carry_out, check_name, check_set, read_environment
from launch.watch import Watched, Watcher

_TIERS = ("spot", "reserved", "on-demand")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    # What is to be run stands behind the first "--", and is nobody's option.
    at = given.index("--") if "--" in given else len(given)
    arguments = _parser().parse_args(given[:at])
    arguments.command = given[at + 1 :]
    arguments.again = shlex.join(("python", "-m", "launch.pod", *given))
    try:
        if arguments.needs_command and not arguments.command:
            raise LaunchError(
                "nothing to run: give the command behind --, as in -- jaxlab train ..."
            )
        return arguments.call(arguments)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.pod", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _pod_commands(commands)
    _cluster_commands(commands)
    local = _command(commands, "local", _local, "several processes on this machine", runs=True)
    local.add_argument("--processes", type=_positive, default=2, metavar="N", help="(2)")
    text = "virtual CPU devices of each; 0: the machine's own devices (4)"
    local.add_argument("--devices", type=_count, default=4, metavar="N", help=text)
    text = "in a row; a start that lasts --healthy seconds begins a new row (10)"
    local.add_argument("--restarts", type=_count, default=10, metavar="N", help=text)
    local.add_argument("--healthy", type=_amount, default=600.0, metavar="S", help="(600)")
    text = "seconds to save in after SIGTERM (60)"
    local.add_argument("--grace", type=_amount, default=60.0, metavar="S", help=text)
    local.add_argument("--log-dir", type=Path, metavar="DIR", help="a log for each process")
    return parser


def _command(
    commands,
    name: str,
    call: Callable[..., int],
    text: str,
    *,
    runs: bool = False,
    variables: bool = True,
) -> argparse.ArgumentParser:
    """A command; one that ``runs`` something takes it behind ``--``, and its ``variables``."""
    usage = f"python -m launch.pod {name} [options]" + " -- COMMAND" * runs
    added = commands.add_parser(name, help=text, description=text, usage=usage)
    added.set_defaults(call=call, needs_command=runs)
    added.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    if runs and variables:
        text = "a variable of the run; NAME alone: its value here, which no plan shows"
        added.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help=text)
    return added


def _pod_commands(commands) -> None:
    added = {
        "create": _command(commands, "create", _create, "ask for TPUs (queued resource)"),
        "run": _command(commands, "run", _run, "bring the code there and start", runs=True),
        "watch": _command(
            commands, "watch", _watch, "bring the run up again whenever it is lost", runs=True
        ),
        "resume": _command(
            commands,
            "resume",
            _resume,
            "start again with the code and the variables that are there",
            runs=True,
            variables=False,
        ),
        "logs": _command(commands, "logs", _logs, "the last lines of every worker"),
        "delete": _command(commands, "delete", _delete, "give the TPUs back"),
    }
    for name, each in added.items():
        each.add_argument("--name", required=True, help="of the queued resource")
        each.add_argument("--zone", required=True)
        each.add_argument("--project")
        if name in ("create", "watch"):
            _accelerator_options(each)
            each.add_argument("--tier", choices=_TIERS, default="on-demand", help="(on-demand)")
            each.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
            text = "what every worker runs as root when it boots, to mount the folder of the runs"
            each.add_argument("--startup-script", metavar="FILE", help=text)
        if name in ("run", "watch"):
            text = "run the last commit although files differ from it"
            each.add_argument("--allow-dirty", action="store_true", help=text)
    added["watch"].add_argument("--restarts", type=_count, default=20, metavar="N", help="(20)")
    added["watch"].add_argument("--poll", type=_amount, default=60.0, metavar="S", help="(60)")
    added["logs"].add_argument("--lines", type=_positive, default=20, metavar="N", help="(20)")


def _cluster_commands(commands) -> None:
    cluster = _command(commands, "gke", _gke, "TPUs under Kubernetes (JobSet)", runs=True)
    cluster.add_argument("--name", required=True)
    _accelerator_options(cluster)
    cluster.add_argument("--image", required=True, help="a container image with jaxlab")
    cluster.add_argument("--restarts", type=_count, default=20, metavar="N", help="(20)")
    cluster.add_argument("--spot", action="store_true")
    text = "the Kubernetes secret that holds what --env NAME names (jaxlab)"
    cluster.add_argument("--secret", default="jaxlab", metavar="NAME", help=text)
    text = "mount a persistent volume claim, for the run's folder"
    cluster.add_argument("--volume", action="append", default=[], metavar="CLAIM=PATH", help=text)
    cluster.add_argument("--via", choices=("kubectl", "xpk"), default="kubectl", help="(kubectl)")
    cluster.add_argument("--cluster", help="of --via xpk")

    nodes = _command(commands, "slurm", _slurm, "nodes with GPUs under Slurm", runs=True)
    nodes.add_argument("--name", required=True)
    nodes.add_argument("--nodes", type=_positive, required=True, metavar="N")
    nodes.add_argument("--gpus", type=_positive, default=8, metavar="N", help="of a node (8)")
    nodes.add_argument("--hours", type=_amount, default=24.0, metavar="H", help="(24)")
    nodes.add_argument("--partition")
    nodes.add_argument("--restarts", type=_count, default=20, metavar="N", help="(20)")


def _accelerator_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--accelerator", required=True, metavar="TYPE", help="such as v5p-128")
    parser.add_argument("--slices", type=_positive, default=1, metavar="N", help="of it (1)")


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _count(text: str) -> int:
    return _whole(text, 0)


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return number


def _do(plan: Plan, arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        print(plan, end="")
    else:
        carry_out(plan)
    return 0


def _pod(arguments: argparse.Namespace) -> Pod:
    return Pod(check_name("--name", arguments.name), arguments.zone, arguments.project)


def _pairs(option: str, given: Sequence[str], form: str) -> dict[str, str]:
    pairs = {}
    for word in given:
        key, sign, value = word.partition("=")
        if not sign:
            raise LaunchError(f"{option} {word}: give {form}")
        pairs[check_name(option, key)] = value
    return pairs


def _creation(arguments: argparse.Namespace) -> Plan:
    labels = _pairs("--label", arguments.label, "KEY=VALUE")
    chips = accelerator(arguments.accelerator, arguments.slices)
    script = arguments.startup_script
    if script is not None and ("," in script or not Path(script).is_file()):
        raise LaunchError(
            f"--startup-script {script}: there is no such file, or a comma in its name"
        )
    return cloud_tpu.create(
        _pod(arguments), chips, tier=arguments.tier, labels=labels, startup_script=script
    )


# Where jaxlab writes what is to last: runs, banks, results, reports.
_WRITTEN = ("--out", "--bank", "--json", "--report")


def _check_written(command: Sequence[str], why: str) -> None:
    """Raise LaunchError for what is written where not all workers find it again."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, sign, path = word.partition("=")
        path = path if sign else following
        if option in _WRITTEN and path and not path.startswith("/") and "://" not in path:
            raise LaunchError(
                f"{option} {path}: {why}; give a whole path that all workers share, such as "
                "/mnt/runs/a"
            )


_NEXT_RUN = f"lies in ~/{cloud_tpu.FOLDER} of each worker, which the next run removes"


def _start(arguments: argparse.Namespace) -> Plan:
    _check_written(arguments.command, _NEXT_RUN)
    plain, secrets = _environment(arguments)
    commit = _commit(allow_dirty=arguments.allow_dirty)
    return cloud_tpu.run(
        _pod(arguments), arguments.command, commit=commit, environment=plain, secrets=secrets
    )


def _environment(arguments: argparse.Namespace) -> tuple[dict[str, str], tuple[str, ...]]:
    """The run's variables, and the names of those whose values must be here before chips come."""
    plain, secrets = read_environment(arguments.env)
    if not arguments.dry_run:
        check_set(secrets)
    for name in secrets:
        if name not in os.environ:
            print(f"# warning: {name} is not set in this environment; export it before the run")
    return plain, secrets


def _commit(*, allow_dirty: bool) -> str:
    """What is packed is a commit, so that it is known later what ran."""
    if _git("status", "--porcelain") and not allow_dirty:
        raise LaunchError(
            "files differ from the last commit, which is what would run: commit them, or give "
            "--allow-dirty to run without them"
        )
    return _git("rev-parse", "HEAD")


def _git(*words: str) -> str:
    ended = subprocess.run(("git", *words), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise LaunchError(f"git {shlex.join(words)}: {ended.stderr.strip()}; run from a checkout")
    return ended.stdout.strip()


def _create(arguments: argparse.Namespace) -> int:
    return _do(_creation(arguments), arguments)


def _run(arguments: argparse.Namespace) -> int:
    return _do(_start(arguments), arguments)


def _resume(arguments: argparse.Namespace) -> int:
    _check_written(arguments.command, _NEXT_RUN)
    return _do(cloud_tpu.start(_pod(arguments), arguments.command), arguments)


def _logs(arguments: argparse.Namespace) -> int:
    return _do(cloud_tpu.logs(_pod(arguments), arguments.lines), arguments)


def _delete(arguments: argparse.Namespace) -> int:
    return _do(cloud_tpu.delete(_pod(arguments)), arguments)


def _watch(arguments: argparse.Namespace) -> int:
    watched = Watched(
        pod=_pod(arguments),
        chips=accelerator(arguments.accelerator, arguments.slices),
        create=_creation(arguments),
        run=_start(arguments),
        command=arguments.command,
        restarts=arguments.restarts,
        poll_seconds=arguments.poll,
    )
    if not arguments.dry_run:
        return Watcher(watched).watch()
    pod = watched.pod
    print(f"# every {arguments.poll:g} s, at most {arguments.restarts} restarts")
    print(f"{cloud_tpu.state(pod)}\n{cloud_tpu.codes(pod)}")
    print("\n# when the chips are gone:")
    for plan in (cloud_tpu.delete(pod), watched.create, watched.run):
        print(plan)
    print("# when a worker is lost:")
    print(cloud_tpu.stop(pod))
    print(cloud_tpu.start(pod, arguments.command), end="")
    return 0


def _gke(arguments: argparse.Namespace) -> int:
    _check_written(arguments.command, "lies in the container, and ends with it")
    plain, secrets = read_environment(arguments.env)
    name = check_name("--name", arguments.name)
    chips = accelerator(arguments.accelerator, arguments.slices)
    common = {"image": arguments.image, "restarts": arguments.restarts, "environment": plain}
    if arguments.via == "kubectl":
        options = {"secrets": secrets, "secret_name": arguments.secret, "spot": arguments.spot}
        options["volumes"] = _pairs("--volume", arguments.volume, "CLAIM=PATH")
        return _do(gke.apply(name, chips, arguments.command, **common, **options), arguments)
    if arguments.spot or arguments.volume:
        raise LaunchError(
            "--spot, --volume: xpk has them of its cluster; leave them out or use --via kubectl"
        )
    if not arguments.cluster:
        raise LaunchError("--via xpk needs --cluster NAME")
    if secrets:
        raise LaunchError(f"--env {secrets[0]}: xpk would write it out; use --via kubectl")
    plan = gke.through_xpk(name, chips, arguments.command, cluster=arguments.cluster, **common)
    return _do(plan, arguments)


def _slurm(arguments: argparse.Namespace) -> int:
    plain, secrets = _environment(arguments)
    plan = slurm.submit(
        check_name("--name", arguments.name),
        arguments.command,
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        hours=arguments.hours,
        restarts=arguments.restarts,
        environment=plain,
        secrets=secrets,
        partition=arguments.partition,
    )
    return _do(plan, arguments)


def _local(arguments: argparse.Namespace) -> int:
    plain, _ = read_environment(arguments.env)  # names alone are inherited anyway
    run = Local(
        command=arguments.command,
        processes=arguments.processes,
        devices=arguments.devices or None,
        restarts=arguments.restarts,
        healthy=arguments.healthy,
        grace=arguments.grace,
        log_dir=arguments.log_dir,
        again=arguments.again,
        environment=plain,
    )
    if not arguments.dry_run:
        program, *words = run.command
        program = find_program(program, plain.get("PATH", os.environ.get("PATH", os.defpath)))
        return LocalLauncher(dataclasses.replace(run, command=(program, *words))).launch()
    print(f"# {run.processes} processes on this machine, at most {run.restarts} restarts in a row")
    for worker in range(run.processes):
        words = worker_environment(run, worker, "127.0.0.1:PORT").items()
        print("env " + " ".join(f"{key}={shlex.quote(value)}" for key, value in words), end=" ")
        print(shlex.join(run.command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
