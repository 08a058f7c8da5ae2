"""Every plan as text, compared with what is kept; ``--update-golden`` writes it anew."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxlab.config import load_config
from launch import pod, slurm
from launch.accelerators import accelerator
from launch.plan import Command, EnvironmentFile, LaunchError, Plan, carry_out, read_environment

GOLDEN = Path(__file__).parent / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRAIN = "-- jaxlab train configs/memory3_2b.yaml --out /mnt/runs/a --set name=it\\'s"
PLANS = {
    "create": "create --name a-run --zone us-east5-a --accelerator v5p-128 --tier spot "
    "--project lab --label team=memory --startup-script examples/mount_runs.sh",
    "create_shape": "create --name a-run --zone us-west4-a --accelerator v5p:2x2x16",
    "create_slices": "create --name a-run --zone us-west4-a --accelerator v5e:16x16 --slices 4",
    "run": f"run --name a-run --zone us-east5-a --env WANDB_API_KEY --env TZ=UTC {TRAIN}",
    "watch": f"watch --name a-run --zone us-east5-a --accelerator v6e-64 --tier spot "
    f"--startup-script examples/mount_runs.sh {TRAIN}",
    "resume": f"resume --name a-run --zone us-east5-a {TRAIN}",
    "logs": "logs --name a-run --zone us-east5-a --lines 5",
    "delete": "delete --name a-run --zone us-east5-a",
    "gke": "gke --name a-run --accelerator v5p-128 --slices 2 --image registry/jaxlab:1 --spot "
    f"--volume runs=/mnt/runs --env HF_TOKEN --env TZ=UTC {TRAIN}",
    "xpk": "gke --name a-run --accelerator v5e-256 --image registry/jaxlab:1 --via xpk "
    f"--cluster pods {TRAIN}",
    "slurm": f"slurm --name a-run --nodes 4 --hours 1.5 --partition h200 --env HF_TOKEN {TRAIN}",
    "local": f"local --processes 2 --devices 4 {TRAIN}",
}


def dry(words: str, capsys) -> str:
    given, dashes, command = words.partition(" -- ")
    assert pod.main(shlex.split(f"{given} --dry-run{dashes}{command}")) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    monkeypatch.setattr(pod, "_commit", lambda allow_dirty: COMMIT)
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-value")
    monkeypatch.setenv("HF_TOKEN", "a-secret-value")


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_what_it_was(name, capsys, request):
    text = dry(PLANS[name], capsys)
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
    assert "a-secret-value" not in text


@pytest.mark.parametrize("name", ["gke", "slurm"])
def test_the_files_of_a_plan_are_what_their_readers_take(name, capsys, tmp_path):
    text = dry(PLANS[name], capsys)
    block = text.partition(":\n    ")[2].partition("\n\n#")[0] if name == "gke" else ""
    if name == "gke":
        jobs = yaml.safe_load("    " + block)["spec"]["replicatedJobs"]
        assert jobs[0]["replicas"] == 2 and jobs[0]["template"]["spec"]["parallelism"] == 16
        (container,) = jobs[0]["template"]["spec"]["template"]["spec"]["containers"]
        assert container["command"] == shlex.split(TRAIN)[1:]
        return
    lines = text.splitlines()
    begin = lines.index("    #!/bin/bash")
    script = tmp_path / "job.sh"
    body = [line[4:] for line in lines[begin : lines.index("# 2. queue it")]]
    script.write_text("\n".join(body))
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    # With programs that stand for Slurm's the script asks to be queued again, or does not. As the
    # real one srun tells the highest code of all tasks.
    fake(tmp_path, "jaxlab", "exit $(echo $CODES | cut -d, -f$((SLURM_PROCID + 1)))")
    fake(
        tmp_path,
        "srun",
        'shift; most=0; for SLURM_PROCID in 0 1 2; do export SLURM_PROCID; "$@"; code=$?; '
        "[ $code -gt $most ] && most=$code; done; exit $most",
    )
    for codes, code, asks in (
        ("0,0,0", 0, False),
        ("1,77,137", 1, False),
        ("143,3,77", 3, False),
        ("75,75,75", 75, True),
        ("77,137,77", 137, True),
        ("77,127,77", 127, False),
        ("75,130,75", 130, False),
    ):
        asked = tmp_path / f"asked-{codes}"
        fake(tmp_path, "scontrol", f"touch {asked}")
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        ended = subprocess.run(["bash", script], env=environment | {"CODES": codes}, cwd=tmp_path)
        assert ended.returncode == code
        assert asked.exists() == asks


def test_a_task_of_slurm_lives_through_sigterm_to_write_its_exit_code(tmp_path):
    """Slurm sends it to the shell around the command, too."""
    fake(tmp_path, "jaxlab", 'trap "exit 75" TERM; echo on; while :; do sleep 0.1; done')
    task = subprocess.Popen(
        ["bash", "-c", slurm._TASK, tmp_path, tmp_path / "jaxlab"],
        env=os.environ | {"SLURM_PROCID": "4"},
        stdout=subprocess.PIPE,
        process_group=0,
    )
    assert task.stdout.readline() == b"on\n"
    os.killpg(task.pid, signal.SIGTERM)
    assert task.wait(30) == 75
    task.stdout.close()
    assert (tmp_path / "4").read_text() == "75\n"


def fake(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("name", ["run", "watch", "slurm"])
def test_a_dry_run_says_which_named_variable_is_not_set(name, capsys, monkeypatch):
    words = PLANS[name].replace(" -- ", " --env A_TOKEN -- ")
    monkeypatch.setenv("A_TOKEN", "x")
    assert "warning" not in dry(words, capsys)
    monkeypatch.delenv("A_TOKEN")
    said = "# warning: A_TOKEN is not set in this environment; export it before the run\n"
    assert dry(words, capsys).startswith(said)


def test_resume_offers_no_variables(capsys):
    with pytest.raises(SystemExit):
        pod.main(["resume", "--help"])
    assert "--env" not in capsys.readouterr().out


def test_a_plan_is_carried_out_in_order_and_secrets_come_from_the_environment(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "calls"
    fake(
        tmp_path,
        "gcloud",
        f'echo "$4" >> {log}; [ ! -e .launch/a-run.env ] '
        f"|| cp .launch/a-run.env {tmp_path}/sent.env",
    )
    fake(tmp_path, "git", "true")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert pod.main(shlex.split(PLANS["run"])) == 0
    verbs = [line.split()[0] for line in log.read_text().splitlines()]
    assert verbs == ["scp", "ssh", "scp", "ssh"]
    sent = (tmp_path / "sent.env").read_text()
    assert sent == "JAXLAB_DISTRIBUTED=auto\nTZ=UTC\nWANDB_API_KEY=a-secret-value\n"
    assert not (tmp_path / ".launch" / "a-run.env").exists()
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("[1/7] ") and "a-secret-value" not in said


def test_the_file_with_secrets_is_its_owners_alone(tmp_path):
    file = tmp_path / "run.env"
    file.write_text("old")
    step = EnvironmentFile("variables", str(file), {"A": "b c"}, ("KEY",))
    look = f'. {file}; echo "$A|$KEY" $(stat -c %a {file}) > {tmp_path}/seen; exit 3'
    with pytest.raises(LaunchError, match="ended with exit code 3"):
        carry_out(
            Plan("p", (step, Command("look", ("bash", "-c", look)))),
            say=lambda _: None,
            environment={"KEY": "it's"},
        )
    assert (tmp_path / "seen").read_text() == "b c|it's 600\n"
    assert not file.exists()  # whatever fails


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "create --name a --zone z --accelerator v9-12",
            "--accelerator v9-12: unknown; known are v5e:",
        ),
        ("create --name A_b --zone z --accelerator v5p-8", "--name 'A_b': a name has 1 to 40"),
        ("create --name a --zone z --accelerator v5p-8 --label x", "--label x: give KEY=VALUE"),
        (
            f"run --name a --zone z --env WANDB_API_KEY=abc {TRAIN}",
            "--env WANDB_API_KEY: a secret is not written into a command; export it and give",
        ),
        (
            "create --name a --zone z --accelerator v5p-8 --startup-script no.sh",
            "--startup-script no.sh: there is no such file",
        ),
        *(
            (f"{words} -- jaxlab train c {out}", f"--out runs/a: {why}")
            for words, why in (
                ("run --name a --zone z", "lies in ~/jaxlab-code of each worker"),
                ("watch --name a --zone z --accelerator v5p-8", "lies in ~/jaxlab-code"),
                ("resume --name a --zone z", "lies in ~/jaxlab-code"),
                ("gke --name a --image i --accelerator v6e-8", "lies in the container"),
            )
            for out in ("--out runs/a", "--out=runs/a")
        ),
        *(
            (f"resume --name a --zone z -- jaxlab {words}", f"{out}: lies in ~/jaxlab-code")
            for words, out in (
                ("memory write --run /r --data /d --bank banks/notes", "--bank banks/notes"),
                ("sweep c --over seed=0,1 --json sweep.json", "--json sweep.json"),
                ("memory quantize --out /q --report loss.json --bank /b", "--report loss.json"),
            )
        ),
        *(
            (
                f"slurm --name a --nodes 1 --hours {hours} {TRAIN}",
                f"--hours {hours}: the run is told to save 5 minutes before its time is over",
            )
            for hours in ("0", "0.005", "0.084")
        ),
        (f"run --name a --zone z --env 1x=2 {TRAIN}", "--env 1x: is no name of a variable"),
        ("run --name a --zone z", "nothing to run: give the command behind --"),
        (
            f"gke --name a --image i --accelerator v6e-8 --via xpk {TRAIN}",
            "--via xpk needs --cluster",
        ),
        (
            f"gke --name a --image i --accelerator v6e-8 --via xpk --cluster c --spot {TRAIN}",
            "--spot, --volume: xpk has them of its cluster",
        ),
        (
            "gke --name a --image i --accelerator v6e-8 --via xpk --cluster c --env HF_TOKEN "
            + TRAIN,
            "--env HF_TOKEN: xpk would write it out",
        ),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_option(words, message, capsys):
    assert pod.main(shlex.split(words)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("local --devices -3", "--devices: '-3' is not a whole number from 0 on"),
        ("local --restarts -1", "--restarts: '-1' is not a whole number from 0 on"),
        ("local --grace -1", "--grace: '-1' is not a number from 0 on"),
        ("local --healthy nan", "--healthy: 'nan' is not a number from 0 on"),
        ("slurm --name a --nodes 1 --hours -1", "--hours: '-1' is not a number from 0 on"),
        ("slurm --name a --nodes 1 --hours inf", "--hours: 'inf' is not a number from 0 on"),
        ("slurm --name a --nodes 1 --hours long", "--hours: 'long' is not a number from 0 on"),
        ("slurm --name a --nodes 1 --restarts -1", "--restarts: '-1' is not a whole number"),
        ("gke --name a --image i --accelerator v6e-8 --restarts -1", "--restarts: '-1' is not"),
        ("watch --name a --zone z --accelerator v5p-8 --restarts x", "--restarts: 'x' is not"),
        ("watch --name a --zone z --accelerator v5p-8 --poll -1", "--poll: '-1' is not a number"),
    ],
)
def test_a_number_that_cannot_be_is_refused_with_its_option(words, message, capsys):
    """Before anything is planned, let alone done."""
    with pytest.raises(SystemExit):
        pod.main(shlex.split(f"{words} --dry-run {TRAIN}"))
    assert f"error: argument {message}" in capsys.readouterr().err


def test_a_secret_that_is_not_set_and_a_program_that_is_not_there_are_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pod.main(shlex.split(PLANS["delete"])) == 1
    assert (
        "gcloud: is not installed here; it is needed to give the chips" in capsys.readouterr().err
    )
    for name in ("gcloud", "git", "mkdir", "rm"):
        fake(tmp_path, name, "exit 0")
    (tmp_path / "bash").symlink_to("/bin/bash")
    monkeypatch.delenv("WANDB_API_KEY")
    assert pod.main(shlex.split(PLANS["run"])) == 1
    said = capsys.readouterr()
    assert "--env WANDB_API_KEY: not set in this environment" in said.err
    assert not said.out  # nothing was done before


def test_files_that_differ_from_the_commit_are_not_run_without_a_word(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for words in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m x"):
        subprocess.run(["git", *shlex.split(words)], check=True)
    assert len(pod._commit(allow_dirty=False)) == 40
    (tmp_path / "new").write_text("")
    with pytest.raises(pod.LaunchError, match="differ from the last commit"):
        pod._commit(allow_dirty=False)
    assert len(pod._commit(allow_dirty=True)) == 40


GIVEN = {"ZONE": "z", "RUNS": "/mnt/runs", "DATA": "/mnt/text", "TOKENIZER": "/mnt/t.model"}


@pytest.mark.parametrize("script", sorted(Path("launch").glob("*.sh")), ids=lambda p: p.name)
def test_the_scripts_are_plans_that_can_be_made(script, capsys):
    """What a script passes on, with a zone and dry, makes a plan."""
    ended = subprocess.run(
        ["bash", script, "--dry-run"],
        capture_output=True,
        text=True,
        env={**os.environ, **GIVEN, "ALLOW_DIRTY": "--allow-dirty"},
    )
    assert ended.returncode == 0, ended.stderr
    command = re.search(r"jaxlab train (configs/\S+) .*?--set((?: [\w.]+=[^\s;']+)+)", ended.stdout)
    # What the configuration leaves open is told, in words that a configuration takes.
    config = load_config(command[1], command[2].split())
    if "memory3" in script.name:
        assert config.data.source == GIVEN["DATA"]
        assert config.tokenizer.path == GIVEN["TOKENIZER"]


@pytest.mark.parametrize("name", ["ZONE", "RUNS", "DATA", "TOKENIZER"])
@pytest.mark.parametrize("kind", ["v5e256", "v5p128"])
def test_a_script_that_lacks_something_says_what_and_does_nothing(kind, name, tmp_path):
    fake(tmp_path, "python", f"touch {tmp_path}/ran")
    given = {key: value for key, value in GIVEN.items() if key != name}
    ended = subprocess.run(
        ["sh", f"launch/train_memory3_2b_{kind}.sh"],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **given},
    )
    assert ended.returncode and not (tmp_path / "ran").exists()
    (line,) = ended.stderr.splitlines()
    assert f"{name}: " in line


RECIPES = Path(__file__).parents[2] / "docs" / "howto" / "launch.md"
_BLOCK = re.compile(r"```console\n\$ python -m launch\.pod ([^\n]*)\n(.*?)```", re.DOTALL)


def test_the_recipes_show_what_their_commands_print(capsys, request):
    text = RECIPES.read_text()

    def printed(found: re.Match) -> str:
        assert pod.main(shlex.split(found[1])) == 0
        return f"```console\n$ python -m launch.pod {found[1]}\n{capsys.readouterr().out}```"

    now, count = _BLOCK.subn(printed, text)
    if request.config.getoption("--update-golden"):
        RECIPES.write_text(now)
    assert count >= 5 and now == RECIPES.read_text()


@pytest.mark.parametrize(
    ("name", "hosts", "chips"),
    [("v5e-4", 1, 4), ("v5e-8", 1, 8), ("v6e-8", 1, 8), ("v5e-16", 4, 4), ("v5p-16", 2, 4)],
)
def test_eight_chips_of_a_kind_that_has_them_in_one_machine_are_one_host(name, hosts, chips):
    found = accelerator(name)
    assert (found.hosts, found.chips_of_a_host) == (hosts, chips)


def test_a_variable_that_only_begins_like_a_secret_is_none():
    given = {"TOKENIZERS_PARALLELISM": "false", "PATH_TO": "x", "AUTHOR": "me"}
    assert read_environment([f"{k}={v}" for k, v in given.items()]) == (given, ())


@pytest.mark.parametrize("name", ["DB_PASS", "NETRC_PASSWORD", "GITHUB_PAT", "SENTRY_DSN", "AUTH"])
def test_whatever_is_called_like_a_secret_is_one(name):
    with pytest.raises(LaunchError, match=f"--env {name}: a secret is not written"):
        read_environment([f"{name}=abc"])
