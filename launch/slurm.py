"""Plans for Slurm: nodes with GPUs, one process a node."""

import shlex
from collections.abc import Mapping, Sequence

from launch.plan import Command, File, LaunchError, Plan
from launch.policy import AGAIN

# $0 is the folder of exit codes. A trap, not the signal's default: the code is still to be written.
_TASK = 'trap : TERM; "$@"; code=$?; echo $code > "$0/$SLURM_PROCID"; exit $code'


def script(
    name: str,
    command: Sequence[str],
    *,
    nodes: int,
    gpus: int,
    hours: float,
    restarts: int,
    environment: Mapping[str, str],
    secrets: tuple[str, ...] = (),
    partition: str | None = None,
    grace: int = 300,
) -> str:
    """The batch script. It saves ``grace`` seconds before its time is over and is queued again.

    A node has one process with all its GPUs, and is the job's alone.

    Secrets are exported from the shell that submits, by name. Raises LaunchError for ``hours``
    that are over before it could do more than save.
    """
    minutes = round(hours * 60)
    if minutes * 60 <= grace:
        raise LaunchError(
            f"--hours {hours:g}: the run is told to save {grace / 60:g} minutes before its time is "
            "over; give it more than that, such as 0.5"
        )
    export = ",".join(["ALL", *secrets]) if secrets else "ALL"
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={gpus}",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        f"#SBATCH --time={minutes // 60:02d}:{minutes % 60:02d}:00",
        f"#SBATCH --signal=TERM@{grace}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={name}-%j.log",
        f"#SBATCH --export={export}",
        *([f"#SBATCH --partition={partition}"] if partition else []),
        "",
        *(
            f"export {key}={shlex.quote(value)}"
            for key, value in {"JAXLAB_DISTRIBUTED": "auto", **environment}.items()
        ),
        "",
        "# When one process ends with an error the others, which wait for it, are ended, too. srun",
        "# tells the highest exit code only, so each writes down its own, whatever signal it gets.",
        f'codes=".launch/{name}-$SLURM_JOB_ID"',
        'rm -rf "$codes" && mkdir -p "$codes"',
        f'srun --kill-on-bad-exit=1 bash -c {shlex.quote(_TASK)} "$codes" {shlex.join(command)}',
        "code=$?",
        "",
        "# Preempted, hung, another process lost, a signal: the run goes on from its checkpoint,",
        "# unless one process met what a repetition would meet again.",
        "passes() {",
        f'  case "$1" in 0|{"|".join(map(str, AGAIN))}) true ;;'
        ' *) [ "$1" -gt 128 ] && [ "$1" -ne 130 ] ;; esac',
        "}",
        'again=yes; [ "$code" -eq 0 ] && again=no',
        'for own in $(cat "$codes"/* 2>/dev/null) "$code"; do',
        '  passes "$own" || { again=no; code=$own; break; }',
        "done",
        f'if [ "$again" = yes ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def submit(name: str, command: Sequence[str], **options) -> Plan:
    """Write the script and give it to Slurm."""
    path = f".launch/{name}.sbatch"
    steps = (
        File("what Slurm is to run", path, script(name, command, **options), 0o755),
        Command("queue it", ("sbatch", path)),
    )
    return Plan(f"run {shlex.join(command)} under Slurm", steps)
