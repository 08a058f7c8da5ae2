"""Plans for Slurm: nodes with GPUs, one process a node."""

import shlex
from collections.abc import Mapping, Sequence

from launch.plan import Command, File, Plan
from launch.policy import AGAIN


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

    Secrets are exported from the shell that submits, by name.
    """
    minutes = round(hours * 60)
    export = ",".join(["ALL", *secrets]) if secrets else "ALL"
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={gpus}",
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
        "# When one process ends with an error the others, which wait for it, are ended, too.",
        f"srun --kill-on-bad-exit=1 {shlex.join(command)}",
        "code=$?",
        "",
        "# Preempted, hung, another process lost, a signal: the run goes on from its checkpoint.",
        "again=no",
        f'case "$code" in {"|".join(map(str, AGAIN))}) again=yes ;; esac',
        'if [ "$code" -gt 128 ] && [ "$code" -ne 130 ]; then again=yes; fi',
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
