"""Plans for Cloud TPU: queued resources through ``gcloud``."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence

from launch.accelerators import Accelerator
from launch.plan import Command, EnvironmentFile, Plan

# On every worker, below its home.
FOLDER, ENVIRONMENT, LOG, EXIT, PID = (
    "jaxlab-code", "jaxlab.env", "jaxlab.log", "jaxlab.exit", "jaxlab.pid",
)  # fmt: skip
# Whatever was started before: two runs may not write into one directory.
_END = f"kill -KILL -- -$(cat {PID}) 2>/dev/null; rm -f {PID}"
_NUMBER = (
    "curl -sf -H Metadata-Flavor:Google "
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number"
)


@dataclasses.dataclass(frozen=True)
class Pod:
    """A queued resource: its name and where it is."""

    name: str
    zone: str
    project: str | None = None

    @property
    def place(self) -> tuple[str, ...]:
        """The options that say where."""
        project = () if self.project is None else (f"--project={self.project}",)
        return (f"--zone={self.zone}", *project)

    def gcloud(self, verb: str, *options: str) -> tuple[str, ...]:
        """A command about this queued resource."""
        command = ("gcloud", "compute", "tpus", "queued-resources", verb, self.name)
        return (*command, *self.place, *options)

    def on_all(self, script: str) -> tuple[str, ...]:
        """A shell script on every worker of every slice."""
        return self.gcloud("ssh", "--node=all", "--worker=all", f"--command={script}")

    def copied(self, file: str, target: str) -> tuple[str, ...]:
        """A file of this machine to every worker."""
        command = ("gcloud", "compute", "tpus", "queued-resources", "scp", file)
        return (*command, f"{self.name}:{target}", *self.place, "--node=all", "--worker=all")


def create(
    pod: Pod,
    chips: Accelerator,
    *,
    tier: str,
    labels: Mapping[str, str],
    startup_script: str | None = None,
) -> Plan:
    """Ask for the chips. tier: ``spot``, ``reserved`` or ``on-demand``.

    startup_script: a file here that every worker runs as root whenever it boots, to mount the file
    system of the runs.
    """
    options = [*chips.options, f"--runtime-version={chips.names.runtime}"]
    if chips.where.slices > 1:
        options += [f"--node-count={chips.where.slices}", f"--node-prefix={pod.name}"]
    else:
        options.append(f"--node-id={pod.name}")
    options += [] if tier == "on-demand" else [f"--{tier}"]
    if labels:
        options.append("--labels=" + ",".join(f"{k}={v}" for k, v in sorted(labels.items())))
    if startup_script is not None:
        options.append(f"--metadata-from-file=startup-script={startup_script}")
    command = Command(
        "ask for the chips; they come when there are any", pod.gcloud("create", *options)
    )
    return Plan(f"create {pod.name}: {chips.where}, {tier}", (command,))


def delete(pod: Pod) -> Plan:
    """Give the chips back."""
    why = "give the chips back, with all that is on their disks"
    command = Command(why, pod.gcloud("delete", "--force", "--quiet"))
    return Plan(f"delete {pod.name}", (command,))


def run(
    pod: Pod,
    command: Sequence[str],
    *,
    commit: str,
    environment: Mapping[str, str],
    secrets: tuple[str, ...] = (),
) -> Plan:
    """Bring the code of a commit to all workers, install it, and start the command there."""
    archive = f".launch/jaxlab-{commit[:12]}.tar.gz"
    file = f".launch/{pod.name}.env"
    steps = (
        Command("make a folder for what is sent", ("mkdir", "-p", ".launch")),
        Command(
            "pack the code of the commit",
            ("git", "archive", "--format=tar.gz", f"--output={archive}", commit),
        ),
        Command("bring it to all workers", pod.copied(archive, "jaxlab.tar.gz")),
        Command(
            "unpack and install it there",
            pod.on_all(
                # What mounts the folder of the runs may not be through, on a machine just booted.
                "while [ $(systemctl is-active google-startup-scripts) = activating ]; "
                "do sleep 2; done; "
                f"rm -rf {FOLDER} && mkdir {FOLDER} && tar -xzf jaxlab.tar.gz -C {FOLDER} && "
                # uv, because the images' own Python may be older than is needed.
                f"cd {FOLDER} && python3 -m pip install -q --user uv && UV=~/.local/bin/uv && "
                "$UV venv -q --python 3.12 .venv && $UV pip install -q -p .venv -e '.[tpu]'"
            ),
        ),
        EnvironmentFile(
            "variables of the run",
            file,
            {"JAXLAB_DISTRIBUTED": "auto", **environment},
            secrets,
        ),
        Command("bring them to all workers", pod.copied(file, ENVIRONMENT)),
        *start(pod, command).steps,
    )
    return Plan(f"run {shlex.join(command)} on {pod.name}", steps)


def start(pod: Pod, command: Sequence[str]) -> Plan:
    """Start the command on all workers with what is there; it goes on from its last checkpoint."""
    inner = (
        f"set -a; . ~/{ENVIRONMENT}; set +a; PATH=$HOME/{FOLDER}/.venv/bin:$PATH; "
        f"{shlex.join(command)}; echo $? > ~/{EXIT}"
    )
    script = (
        f"{_END}; chmod 600 {ENVIRONMENT}; rm -f {EXIT}; cd {FOLDER}; "
        f"setsid nohup bash -c {shlex.quote(inner)} >> ~/{LOG} 2>&1 < /dev/null & "
        f"echo $! > ~/{PID}"
    )
    why = "start it on all workers; it does not end with this connection"
    return Plan(f"start again on {pod.name}", (Command(why, pod.on_all(script)),))


def stop(pod: Pod) -> Plan:
    """End the command on all workers: those that lost a partner wait for it."""
    command = Command("end what is left of the run", pod.on_all(_END), may_fail=True)
    return Plan(f"stop on {pod.name}", (command,))


def logs(pod: Pod, lines: int) -> Plan:
    """The last lines of every worker's log."""
    script = f"echo == worker $({_NUMBER}); tail -n {lines} {LOG}"
    return Plan(f"logs of {pod.name}", (Command("read the logs", pod.on_all(script)),))


def state(pod: Pod) -> Command:
    """Prints the state of the queued resource: ACTIVE, SUSPENDED, ...; nothing without one."""
    command = ("gcloud", "compute", "tpus", "queued-resources", "list", *pod.place)
    only = (f"--filter=name~/{pod.name}$", "--format=value(state.state)")
    return Command("ask for its state", (*command, *only))


def codes(pod: Pod) -> Command:
    """Prints ``worker HOST NUMBER STATE`` of every worker.

    STATE is an exit code; ``running``; or ``idle``, when nothing was started there. What vanished
    without an exit code was killed.
    """
    script = (
        f"echo worker $(hostname) $({_NUMBER}) $(cat {EXIT} 2>/dev/null || "
        f"if [ ! -f {PID} ]; then echo idle; "
        f"elif kill -0 -- -$(cat {PID}) 2>/dev/null; then echo running; else echo 137; fi)"
    )
    return Command("ask how the workers are", pod.on_all(script), may_fail=True)
