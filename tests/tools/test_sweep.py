"""Laws of a sweep: every combination once, nothing twice, divergence is a result."""

import json
import os
import shlex
import signal
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxlab.cli import main
from jaxlab.errors import ConfigError, Interrupted
from jaxlab.tools import sweep
from jaxlab.tools.output import short_names
from jaxlab.tools.sweep import SweepError, cells_of, interval, run_sweep, split_values
from jaxlab.training.guards import NotFiniteError

CONFIG = """
name: tiny
model: {layers: 1, heads: 1, kv_heads: 1, head_dim: 8, ffn_width: 8}
data: {source: facts:0, sequence_length: 64}
stages: {warmup: {steps: 2, batch_size: 1}}
"""


class Trainer:
    """Stands for the child processes: a loss that depends on rate and seed."""

    def __init__(self):
        self.commands, self.codes = [], {}

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        run = Path(command[command.index("--out") + 1])
        values = dict(text.split("=") for text in command[command.index("--set") + 1 :])
        code = self.codes.get(values["optimizer.learning_rate"], 0)
        if code == 0:
            run.mkdir(parents=True)
            loss = float(values["optimizer.learning_rate"]) + 0.1 * float(values.get("seed", 0))
            lines = [{"step": 1, "loss": loss + 1.0}, {"step": 2, "validation_loss": loss}]
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        else:
            kwargs["stdout"].write("error: the reason\n")
        return SimpleNamespace(returncode=code)


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    fake = Trainer()
    replace_run(monkeypatch, fake)
    return fake


def replace_run(monkeypatch, run) -> None:
    """In the sweep alone: matplotlib starts processes of its own when it first looks for fonts."""
    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))


@pytest.fixture
def config(tmp_path) -> str:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return str(tmp_path / "tiny.yaml")


def run(config, tmp_path, *over, **settings):
    lines = []
    result = run_sweep(
        config, over, json_file=tmp_path / "out.json", report=lines.append, **settings
    )
    assert json.loads((tmp_path / "out.json").read_text()) == result
    return result, lines


def test_cells_are_the_grid_with_the_last_key_turning_fastest():
    cells = cells_of(["a.b=1,2", "seed=0, 1"])
    found = [cell.overrides for cell in cells]
    assert found == [
        ["a.b=1", "seed=0"],
        ["a.b=1", "seed=1"],
        ["a.b=2", "seed=0"],
        ["a.b=2", "seed=1"],
    ]
    assert len({cell.name for cell in cells}) == 4


def test_no_two_cells_share_a_folder_whatever_their_values_are():
    """A folder's name has neither slashes nor any length that is asked for."""
    long = "x" * 300
    names = [c.name for c in cells_of([f"data.source=a/b,a_b,a b,{long}1,{long}2", "seed=0,1"])]
    assert len(set(names)) == 10
    assert max(map(len, names)) < 200 and not any("/" in name for name in names)
    assert names[2] == "data.source=a_b,seed=0"  # a plain name is left as it is


def test_cells_that_are_the_same_are_refused_before_the_first_is_trained(trainer, config, tmp_path):
    cells = cells_of(["optimizer.learning_rate=0.3"]) * 2
    with pytest.raises(ConfigError, match="learning_rate=0.3 .*twice"):
        list(sweep.run_cells(config, cells, out=tmp_path / "out"))
    assert trainer.commands == []


@pytest.mark.parametrize("over", [["a"], ["=1"], ["a=1,,2"], ["a=1", "a=2"]])
def test_what_is_no_list_of_values_is_refused(over):
    with pytest.raises(ConfigError, match=r"^--over "):
        cells_of(over)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("null,{kappa: 2, gamma: 0.9}", ["null", "{kappa: 2, gamma: 0.9}"]),
        ("[1, [2, 3]],4", ["[1, [2, 3]]", "4"]),
        ("'a,b',\"c,'d\"", ["'a,b'", '"c,\'d"']),
        ("{name: 'x}, y'},z", ["{name: 'x}, y'}", "z"]),
        ("ann's,bob's", ["ann's", "bob's"]),
        ("{a: 1, b", ["{a: 1, b"]),
    ],
)
def test_only_commas_outside_brackets_and_quotes_part_values(text, values):
    assert split_values(text) == values
    assert [cell.values["key"] for cell in cells_of([f"key={text}"])] == values


def test_numbers_are_numbers_in_the_results_and_all_else_is_as_it_was_given(
    trainer, config, tmp_path
):
    over = ("optimizer.learning_rate=1e-3,2", "optimizer.ire=null,{kappa: 1}", "seed=0")
    result, _ = run(config, tmp_path, *over)
    found = [row["set"] for row in result["rows"]]
    assert found[0] == {"optimizer.learning_rate": 0.001, "optimizer.ire": "null", "seed": 0}
    assert found[3] == {"optimizer.learning_rate": 2, "optimizer.ire": "{kappa: 1}", "seed": 0}
    # Also where a former version wrote texts.
    for path in (tmp_path / "out").glob("*.json"):
        path.write_text(path.read_text().replace('"seed": 0', '"seed": "0"'))
    again, _ = run(config, tmp_path, *over)
    assert [row["set"] for row in again["rows"]] == found


def test_the_table_names_keys_by_their_ends_and_cuts_nothing_that_differs(
    trainer, config, tmp_path, capsys
):
    over = [
        "optimizer.learning_rate=0.1",
        "optimizer.ire.gamma=0.6,0.8",
        "optimizer.ire.update_interval=10",
        "data.source=folder:/a/long/way/to/the/texts/one,folder:/a/long/way/to/the/texts/two",
        "data.seed=3",
        "seed=0,1",
    ]
    run(config, tmp_path, *over, overrides=["optimizer.ire.kappa=1"])
    printed = capsys.readouterr().out
    head, *rows = [line for line in printed.splitlines() if line.startswith(("┃", "│"))]
    names = [cell.strip() for cell in head.strip("┃").split("┃")]
    assert names[:5] == ["learning_rate", "gamma", "update_interval", "source", "seed"]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert [row[1] for row in cells] == ["0.6", "0.6", "0.8", "0.8"]
    assert [row[3] for row in cells] == ["…/one", "…/two"] * 2


def test_keys_that_end_alike_are_told_by_more_of_their_parts():
    keys = ["a.steps", "b.c.steps", "b.d.steps", "seed", "data.seed"]
    assert list(short_names(keys).values()) == [
        "a.steps",
        "c.steps",
        "d.steps",
        "seed",
        "data.seed",
    ]


def test_seeds_are_averaged_and_the_lowest_mean_is_the_best(trainer, config, tmp_path):
    result, lines = run(config, tmp_path, "optimizer.learning_rate=0.3,0.2", "seed=0,1")
    assert [row["validation_loss"] for row in result["rows"]] == pytest.approx([0.3, 0.4, 0.2, 0.3])
    assert [group["mean"] for group in result["groups"]] == pytest.approx([0.35, 0.25])
    # No seconds: a run that is resumed has been several processes.
    keys = {"set", "status", "validation_loss", "training_loss"}
    assert all(set(row) == keys for row in result["rows"])
    assert result["groups"][0]["std"] == pytest.approx(0.1 / 2**0.5)
    assert result["best"] == {"optimizer.learning_rate": 0.2}
    assert lines[0] == "1/4  optimizer.learning_rate=0.3 seed=0  validation_loss 0.3000"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(trainer, config, tmp_path):
    first, _ = run(config, tmp_path, "optimizer.learning_rate=0.3,0.2")
    assert len(trainer.commands) == 2
    again, _ = run(config, tmp_path, "optimizer.learning_rate=0.3,0.2,0.1")
    assert len(trainer.commands) == 3 and again["rows"][:2] == first["rows"]
    with pytest.raises(SweepError, match="another configuration"):
        run(config, tmp_path, "optimizer.learning_rate=0.3", overrides=["seed=5"])


def test_a_run_that_diverges_is_a_result_and_never_the_best(trainer, config, tmp_path):
    trainer.codes = {"0.1": NotFiniteError.exit_code}
    result, lines = run(config, tmp_path, "optimizer.learning_rate=0.1,0.2")
    assert [group["diverged"] for group in result["groups"]] == [1, 0]
    assert result["best"] == {"optimizer.learning_rate": 0.2}
    assert lines[0].endswith("diverged")


def test_another_failure_ends_the_sweep_with_its_reason(trainer, config, tmp_path):
    trainer.codes = {"0.2": 1}
    with pytest.raises(SweepError, match=r"learning_rate=0.2: ended with 1: error: the reason"):
        run(config, tmp_path, "optimizer.learning_rate=0.3,0.2,0.1")
    assert len(trainer.commands) == 2  # none is started after the one that failed
    trainer.codes = {}
    run(config, tmp_path, "optimizer.learning_rate=0.3,0.2")
    assert len(trainer.commands) == 3  # the first cell was kept, the second is tried again


def test_an_interrupted_sweep_says_how_many_cells_are_done_and_goes_on(
    trainer, config, tmp_path, monkeypatch, capsys
):
    sent = []

    def stopped(command, **kwargs):
        if len(trainer.commands) == 1:
            sent.append(command)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return SimpleNamespace(returncode=Interrupted.exit_code)
        return trainer(command, **kwargs)

    replace_run(monkeypatch, stopped)
    over = ["--over", "optimizer.learning_rate=0.3,0.2,0.1"]
    words = ["sweep", config, *over, "--json", str(tmp_path / "out.json")]
    assert main(words) == 130
    (line,) = capsys.readouterr().err.splitlines()
    again = shlex.join(["jaxlab", *words])
    assert line == f"interrupted: 1 of 3 cells are done; go on with: {again}"
    assert len(sent) == 1  # no cell is started after the one that was interrupted
    replace_run(monkeypatch, trainer)
    assert main(words) == 0 and len(trainer.commands) == 3


def test_every_cell_is_checked_before_the_first_is_trained(trainer, config, tmp_path):
    with pytest.raises(ConfigError, match="must be positive"):
        run(config, tmp_path, "optimizer.learning_rate=0.3,-1")
    assert trainer.commands == [] and not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"^--over optimizer.ire.kapa=1: .*ire.kappa\?$"):
        run(config, tmp_path, "optimizer.ire.kapa=1,2", overrides=["optimizer.ire.kappa=1"])


def test_workers_train_at_once_on_cores_of_their_own_and_rows_keep_their_order(
    trainer, config, tmp_path, monkeypatch
):
    at_once, cores = threading.Barrier(2, timeout=30), set()

    def together(command, **kwargs):
        at_once.wait()  # broken, and with it the sweep, if one waits for the other
        cores.add(frozenset(os.sched_getaffinity(0)))
        return trainer(command, **kwargs)

    replace_run(monkeypatch, together)
    before = os.sched_getaffinity(0)
    result, _ = run(config, tmp_path, "optimizer.learning_rate=0.4,0.3,0.2,0.1", workers=2)
    losses = [row["validation_loss"] for row in result["rows"]]
    assert losses == pytest.approx([0.4, 0.3, 0.2, 0.1])
    if len(before) > 1:
        assert len(cores) == 2 and not frozenset.intersection(*cores)
    assert os.sched_getaffinity(0) == before


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0 and found["half_width"] == pytest.approx(4.302653 / 3**0.5)
    assert interval([1.5])["half_width"] is None
