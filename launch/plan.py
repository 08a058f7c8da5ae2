"""Plans: steps that can be read before anything is done, and are then carried out in order."""

import dataclasses
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Values of such variables are taken from the environment by name and never stand in a plan.
_SECRET = re.compile(
    r"(KEY|TOKEN|SECRET|PASS|PASSWORD|PASSWD|CREDENTIAL|COOKIE|(^|_)(AUTH|DSN|PAT))S?(_|$)",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class LaunchError(Exception):
    """What keeps a run from being launched: one line that says what, where and the cure."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A program that is run here. ``may_fail``: it goes on when there is nothing to do for it."""

    why: str
    argv: tuple[str, ...]
    may_fail: bool = False

    def __str__(self) -> str:
        return shlex.join(self.argv)


@dataclasses.dataclass(frozen=True)
class File:
    """A file that is written here; ``mode`` are its permissions."""

    why: str
    path: str
    content: str
    mode: int = 0o644

    def __str__(self) -> str:
        return f"write {self.path}:\n" + _indented(self.content)


@dataclasses.dataclass(frozen=True)
class EnvironmentFile:
    """Variables for a worker, in a file that only its owner reads.

    plain: with their values. secret: by name; the values come from the environment when the plan is
    carried out, and are in no plan and no log.
    """

    why: str
    path: str
    plain: Mapping[str, str]
    secret: tuple[str, ...] = ()

    def content(self, environment: Mapping[str, str]) -> str:
        """The file; raises LaunchError naming the variables that the environment lacks."""
        check_set(self.secret, environment)
        values = {**self.plain, **{name: environment[name] for name in self.secret}}
        return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())

    def __str__(self) -> str:
        lines = [f"{name}={shlex.quote(value)}" for name, value in self.plain.items()]
        lines += [f"{name}=(from this environment, not shown)" for name in self.secret]
        how = "readable by its owner only and removed at the end"
        return f"write {self.path}, {how}:\n" + _indented("\n".join(lines))


Step = Command | File | EnvironmentFile


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done, in order; ``needs`` is what nobody but the user can see to before."""

    title: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"# {self.title}", *(f"# needs {need}" for need in self.needs)]
        for number, step in enumerate(self.steps, start=1):
            lines += ["", f"# {number}. {step.why}", str(step)]
        return "\n".join(lines) + "\n"


def carry_out(
    plan: Plan,
    *,
    say: Callable[[str], None] = print,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Do the steps one after the other. Raises LaunchError at the first that fails."""
    try:
        for number, step in enumerate(plan.steps, start=1):
            say(f"[{number}/{len(plan.steps)}] {step.why}")
            if isinstance(step, Command):
                run_command(step)
            elif isinstance(step, File):
                _write(step.path, step.content, step.mode)
            else:
                _write(step.path, step.content(environment), 0o600)
    finally:
        for step in plan.steps:
            if isinstance(step, EnvironmentFile):
                Path(step.path).unlink(missing_ok=True)


def run_command(step: Command, *, capture: bool = False) -> str:
    """Run a command; what it printed, with ``capture``. Raises LaunchError."""
    try:
        ended = subprocess.run(
            step.argv, check=False, stdout=subprocess.PIPE if capture else None, text=True
        )
    except FileNotFoundError:
        raise LaunchError(
            f"{step.argv[0]}: is not installed here; it is needed to {step.why}"
        ) from None
    if ended.returncode and not step.may_fail:
        shown = str(step)
        shown = shown if len(shown) < 200 else f"{shown[:200]}..."
        raise LaunchError(f"{shown}: ended with exit code {ended.returncode}")
    return ended.stdout or ""


def _write(path: str, content: str, mode: int) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as opened:
        opened.write(content)


def check_set(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """Raise LaunchError naming the first variable that the environment lacks."""
    for name in names:
        if name not in environment:
            raise LaunchError(f"--env {name}: not set in this environment; export it first")


def read_environment(given: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """``NAME=VALUE`` and ``NAME`` of ``--env``: values, and names whose values come later.

    Raises LaunchError for a secret that is written out: it would stand in shells and plans.
    """
    plain, secret = {}, []
    for word in given:
        name, sign, value = word.partition("=")
        if not _VARIABLE.fullmatch(name):
            raise LaunchError(f"--env {name}: is no name of a variable")
        if not sign:
            secret.append(name)
        elif _SECRET.search(name):
            raise LaunchError(
                f"--env {name}: a secret is not written into a command; export it and give "
                f"--env {name} alone"
            )
        else:
            plain[name] = value
    return plain, tuple(secret)


def check_name(option: str, name: str) -> str:
    """``name`` if Google Cloud and Kubernetes take it. Raises LaunchError."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise LaunchError(
            f"{option} {name!r}: a name has 1 to 40 small letters, digits and dashes, begins with "
            "a letter and does not end with a dash"
        )
    return name


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
