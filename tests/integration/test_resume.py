"""A run that was broken off, however often and wherever, ends as the unbroken run does."""

import json
import random
import re
import shlex

from tests.integration.tiny_run import (
    END,
    end_state,
    files_of,
    flip_bit,
    host_state,
    numbers,
    require_equal_runs,
)

# How the processes of one run die, one after the other, and where the next one goes on. The run
# saves 1, 2-warmup, 3, 4 and 5-continual, and keeps one unlabelled checkpoint.
DEATHS = {
    "after a save, before the next step": (("die_after_save", 1), 1),
    "in a save, before its last file": (("die_at", "open", r"2-warmup\.tmp/manifest\.json$"), 1),
    "in a save, before its name": (("die_at", "os.rename", r"/000000002-warmup$"), 1),
    "in a save, after its name": (("die_at", "open", r"/checkpoints$", 2), 3),
    "while an old checkpoint is removed": (("die_at", "shutil.rmtree", r"/000000003\.tmp$"), 4),
}
# Of the operations on checkpoints after a resume at step 4, those of the last save.
MOMENTS = range(60, 116)


def resumed_at(out: str) -> int:
    found = re.search(r"^resuming at step (\d+) ", out, re.MULTILINE)
    return int(found[1]) if found else 0


def test_a_run_killed_again_and_again_equals_the_unbroken_one(tiny, tmp_path):
    run = tmp_path / "run"
    moment = random.SystemRandom().choice(MOMENTS)
    print(f"the last death is at operation {moment}")
    deaths = [*DEATHS.values(), (("die_at", ".*", "/checkpoints/", moment), None)]
    starts = [0, *(start for _, start in deaths)]
    for number, start in enumerate(starts):
        log = tmp_path / f"{number}.log"
        log.touch()
        before = [("log_batches", str(log)), *(death for death, _ in deaths[number : number + 1])]
        ended = tiny.child(tmp_path, "train", tiny.config, "--out", run, before=before)
        if number < len(DEATHS):
            assert ended.code == -9, ended.err
        assert "damaged" not in ended.out
        # The stream of batches goes on with the batch of the step after the checkpoint.
        at, seen = resumed_at(ended.out), log.read_text().splitlines()
        assert seen == tiny.batches[at : at + len(seen)]
        # The last death may come before a batch was read, and the checkpoint before it or not.
        if seen and start is not None:
            assert at == start
    assert ended.code == 0, ended.err
    require_equal_runs(run, tiny.run)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == sorted(path.name for path in (tiny.run / "checkpoints").iterdir())


def test_a_finished_run_is_left_as_it_is(tiny, tmp_path):
    run = tiny.copy_run(tmp_path)
    before = files_of(run / "checkpoints")
    ended = tiny.child(tmp_path, "train", tiny.config, "--out", run)
    assert ended.code == 0 and f"done: step 5, run {run}" in ended.out
    assert files_of(run / "checkpoints") == before
    assert numbers(run) == numbers(tiny.run)


def test_damaged_checkpoints_are_set_aside_and_the_end_is_the_same(tiny, tmp_path):
    run = tiny.copy_run(tmp_path)
    checkpoints = run / "checkpoints"
    for name in (END, "000000004"):
        arrays = [path for path in (checkpoints / name).rglob("d/*") if path.is_file()]
        flip_bit(max(arrays, key=lambda path: path.stat().st_size))
    ended = tiny.child(tmp_path, "train", tiny.config, "--out", run)
    assert ended.code == 0, ended.err
    messages = [line for line in ended.out.splitlines() if ": damaged (" in line]
    for name, message in zip((END, "000000004"), messages, strict=True):
        assert message.startswith(f"{checkpoints / name}: damaged (")
        assert message.endswith(f"moved to {name}.damaged, trying the one before")
        assert (checkpoints / f"{name}.damaged").is_dir()
    assert resumed_at(ended.out) == 2
    require_equal_runs(run, tiny.run)


def test_an_interrupt_saves_says_how_to_go_on_and_nothing_is_lost(tiny, tmp_path):
    run = tmp_path / "a run"
    train = ("train", tiny.config, "--set", "training={save_every: 1, keep: 1, evaluate_rows: 2}")
    ended = tiny.child(tmp_path, *train, "--out", run, before=[("interrupt_after_save", 3)])
    assert ended.code == 130 and ended.err == ""
    last = ended.out.splitlines()[-1]
    # The signal came after the save of step 3; step 4 was under way and is kept.
    assert last.startswith("interrupted: saved at step 4 (continual); resume with: jaxlab train ")
    assert (run / "checkpoints" / "000000004").is_dir()
    _, *again = shlex.split(last.partition("resume with: ")[2])
    ended = tiny.child(tmp_path, *again)
    assert ended.code == 0 and resumed_at(ended.out) == 4, ended.err
    assert end_state(run) == end_state(tiny.run)
    assert numbers(run, evaluations=False) == numbers(tiny.run, evaluations=False)


def test_an_interrupt_before_the_first_step_does_not_claim_to_have_saved(tiny, tmp_path):
    run = tmp_path / "run"
    train = ("train", tiny.config, "--out", run)
    ended = tiny.child(tmp_path, *train, before=[("interrupt_before_training",)])
    assert ended.code == 130 and ended.err == ""
    begun = "interrupted: no step was done yet; start again with: jaxlab train "
    assert ended.out.splitlines()[-1].startswith(begun)
    assert not list((run / "checkpoints").iterdir())
    _, *again = shlex.split(ended.out.splitlines()[-1].partition("start again with: ")[2])
    ended = tiny.child(tmp_path, *again)
    assert ended.code == 0, ended.err
    require_equal_runs(run, tiny.run)


def test_no_room_for_a_checkpoint_is_one_error_and_the_one_before_is_kept(tiny, tmp_path):
    run = tmp_path / "run"
    train = ("train", tiny.config, "--out", run)
    ended = tiny.child(tmp_path, *train, before=[("fill_disk_after_save", 2, 2000)])
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    target = run / "checkpoints" / "000000003"
    expected = f"error: {target}: the checkpoint was not written: No space left on device: "
    assert line.startswith(expected) and line.endswith("earlier ones are untouched")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["000000001", "000000002-warmup"]
    ended = tiny.child(tmp_path, *train)
    assert ended.code == 0 and resumed_at(ended.out) == 2, ended.err
    require_equal_runs(run, tiny.run)


def test_no_permission_for_a_checkpoint_is_one_error_that_names_the_cure(tiny, tmp_path):
    run = tmp_path / "run"
    train = ("train", tiny.config, "--out", run)
    ended = tiny.child(tmp_path, *train, before=[("deny_after_save", 2)])
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    target = run / "checkpoints" / "000000003"
    assert line.startswith(f"error: {target}: the checkpoint was not written: [Errno 13] ")
    assert line.endswith(
        "let this account write to " + f"{run}/checkpoints, or train into another directory"
    )
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["000000001", "000000002-warmup"]


def test_sigterm_saves_and_asks_to_be_started_again(tiny, tmp_path):
    run = tmp_path / "run"
    train = ("train", tiny.config, "--set", "training={save_every: 1, keep: 1, evaluate_rows: 2}")
    ended = tiny.child(tmp_path, *train, "--out", run, before=[("terminate_after_save", 3)])
    assert ended.code == 75 and ended.err == ""
    last = ended.out.splitlines()[-1]
    assert last.startswith("preempted: saved at step 4 (continual); resume with: jaxlab train ")
    ended = tiny.child(tmp_path, *train, "--out", run)
    assert ended.code == 0 and resumed_at(ended.out) == 4, ended.err
    assert end_state(run) == end_state(tiny.run)
    times = json.loads((run / "goodput.json").read_text())
    # The fourth step was saved before the process ended: nothing was lost.
    assert times["starts"] == 2 and times["seconds"]["lost"] == 0 < times["seconds"]["down"]


def test_a_hang_is_ended_with_the_stacks_of_all_threads(tiny, tmp_path):
    run = tmp_path / "run"
    hang = ("--set", "training={save_every: 1, keep: 1, evaluate_rows: 2, hang_seconds: 1.0}")
    train = ("train", tiny.config, *hang, "--out", run)
    ended = tiny.child(tmp_path, *train, before=[("hang_at_step", 2)])
    assert ended.code == 76
    assert "nothing has happened for" in ended.err and "in 'step'" in ended.err
    stacks = (run / "hang-0.txt").read_text()
    assert "hanging" in stacks and "run_steps" in stacks
    ended = tiny.child(tmp_path, "train", tiny.config, "--out", run)
    assert ended.code == 0 and resumed_at(ended.out) == 1, ended.err
    assert end_state(run) == end_state(tiny.run)


def test_steps_that_are_not_finite_are_skipped_and_too_many_name_their_batches(tiny, tmp_path):
    skip = (
        "--set",
        "training.skip_nonfinite=1",
        "training.save_every=0",
        "stages.continual.steps=4",
    )
    train = ("train", tiny.config, *skip, "--out")
    ended = tiny.child(tmp_path, *train, tmp_path / "a", before=[("spoil_losses", 2, 4)])
    assert ended.code == 0, ended.err
    skipped = [line for line in ended.out.splitlines() if "skipped" in line]
    assert [line.split(":")[0] for line in skipped] == ["step 2", "step 4", "step 6"]
    assert all(line.endswith("skipped (1 of 1 in a row)") for line in skipped)
    ended = tiny.child(tmp_path, *train, tmp_path / "b", before=[("spoil_losses", 2, 3)])
    assert ended.code == 3
    (line,) = ended.err.splitlines()
    assert "steps 4 to 5 were not finite and training.skip_nonfinite is 1" in line
    assert "their batches are 1 to 2 of this stage's order, rows 2 to 5" in line


def test_neither_evaluation_nor_saving_changes_the_training(tiny, tmp_path):
    run, log = tmp_path / "run", tmp_path / "batches.log"
    rarely = ("--set", "training.evaluate_every=0", "training.save_every=0")
    train = ("train", tiny.config, *rarely, "--out", run)
    ended = tiny.child(tmp_path, *train, before=[("log_batches", str(log))])
    assert ended.code == 0, ended.err
    assert log.read_text().splitlines() == tiny.batches
    assert end_state(run) == end_state(tiny.run) and host_state(run) == host_state(tiny.run)
    assert numbers(run, evaluations=False) == numbers(tiny.run, evaluations=False)
    evaluations = [line for line in numbers(run) if "loss" not in line]
    assert evaluations == [line for line in numbers(tiny.run) if line in evaluations]
    assert [line["step"] for line in evaluations] == [2, 5]


def test_a_run_begun_at_the_end_of_a_stage_goes_on_as_that_run_did(tiny, tmp_path):
    run = tmp_path / "run"
    begun = ("--set", "stages.warmup=null", f"init_from={tiny.run}@warmup")
    ended = tiny.child(tmp_path, "train", tiny.config, *begun, "--out", run)
    assert ended.code == 0, ended.err
    assert (run / "checkpoints" / "000000003-continual").is_dir()
    assert end_state(run) == end_state(tiny.run)


def test_the_control_without_memory_reads_plain_text_in_both_stages(tiny, tmp_path):
    run, log = tmp_path / "run", tmp_path / "batches.log"
    control = ("--set", "stages.continual.memory=false")
    train = ("train", tiny.config, *control, "--out", run)
    ended = tiny.child(tmp_path, *train, before=[("log_batches", str(log))])
    assert ended.code == 0, ended.err
    names = [line.rpartition(" ")[0] for line in log.read_text().splitlines()]
    assert names == ["loss_mask tokens"] * 5
    with_memory = [line.rpartition(" ")[0] for line in tiny.batches]
    assert with_memory[2:] == ["loss_mask reference_lengths references segments tokens"] * 3
    assert not list((run / "data").glob("*.npz"))
    # Up to where the stages part the two runs are one.
    assert numbers(run)[:4] == numbers(tiny.run)[:4]
    assert end_state(run) != end_state(tiny.run)


def test_a_run_that_diverges_is_one_clear_error_and_saves_nothing_of_it(tiny, tmp_path):
    run = tmp_path / "run"
    train = ("train", tiny.config, "--out", run)
    ended = tiny.child(tmp_path, *train, before=[("poison", 2)])
    assert ended.code == 3  # the exit code of divergence alone
    (line,) = ended.err.splitlines()
    assert re.match(r"error: (loss|grad_norm) is nan at step 2: training has diverged; ", line)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000000001"]
    # Nor is it evaluated, though the configuration asks for it after every step.
    assert [line["step"] for line in numbers(run)] == [1, 1]


def test_each_stage_compiles_its_step_once_from_the_start_and_from_a_checkpoint(tiny, tmp_path):
    """A step takes what it gave, what was made new and what was restored for the same."""
    train = ("train", tiny.config, "--out", tmp_path / "run")
    compiled = []
    for more in (["interrupt_after_save", 3], []):  # in the second stage
        before = [["log_compiles"], *([more] if more else [])]
        ended = tiny.child(tmp_path, *train, before=before)
        assert ended.code == (130 if more else 0), ended.err
        compiled.append(ended.err.count("Finished XLA compilation of jit(step)"))
    assert compiled == [2, 1]
