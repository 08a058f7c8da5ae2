"""Metrics, goodput, FLOPs and guards."""

import dataclasses
import io
import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxlab.config import IREConfig, ModelConfig, OptimizerConfig, ScheduleConfig, StageConfig
from jaxlab.training.guards import (
    InterruptGuard,
    NotFiniteError,
    check_finite,
    divergence_advice,
)
from jaxlab.training.metrics import (
    MetricsWriter,
    ProgressBar,
    model_flops_utilization,
    read_metrics,
    train_flops_per_token,
)


@pytest.fixture(params=["with tensorboardX", "without"])
def writer(request, tmp_path, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with MetricsWriter(tmp_path) as writer:
        yield writer
    assert (tmp_path / "tensorboard").exists() == (request.param != "without")


def test_a_line_is_one_json_object_with_plain_numbers(writer, tmp_path):
    writer.write(3, {"loss": jnp.float32(1.5), "rows": np.int64(7), "mfu": None}, stage="warmup")
    writer.write(4, {"loss": float("nan")}, stage="warmup")
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert first == '{"step": 3, "stage": "warmup", "loss": 1.5, "rows": 7, "mfu": null}'
    assert json.loads(second)["loss"] is None
    with pytest.raises(TypeError, match="one number"):
        writer.write(5, {"loss": jnp.ones(2)}, stage="warmup")


def test_truncate_drops_later_steps_and_a_torn_line_and_writing_goes_on(writer, tmp_path):
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": float(step)}, stage="warmup")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    writer.truncate(2)
    writer.write(3, {"loss": 30.0}, stage="warmup")
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_a_writer_opened_again_appends(tmp_path):
    for step in (1, 2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(step, {}, stage="warmup")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_flops_per_token_are_six_a_weight_and_six_a_score():
    model = ModelConfig(layers=2, heads=4, kv_heads=2, head_dim=8, ffn_width=48)
    # width 32: q and o are 32x32, k and v 32x16, three feed-forward matrices of 32x48
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 100
    flops = train_flops_per_token(model, vocab_size=100, sequence_length=64)
    assert flops == 6 * weights + 6 * 2 * 32 * 64


def test_mfu_is_a_share_of_the_stated_peak_and_none_without_one():
    assert model_flops_utilization(10.0, 5.0, peak_flops=100.0, devices=2) == 0.25
    assert model_flops_utilization(10.0, 5.0, peak_flops=None, devices=2) is None


def test_progress_prints_a_line_every_few_steps_where_there_is_no_terminal():
    stream = io.StringIO()
    with ProgressBar("warmup", 5, every=2, stream=stream) as bar:
        for step in range(1, 6):
            bar.update(step, loss=1 / step)
    assert stream.getvalue().splitlines() == [
        "warmup 2/5  loss 0.5",
        "warmup 4/5  loss 0.25",
        "warmup 5/5  loss 0.2",
    ]


def test_progress_draws_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with ProgressBar("warmup", 2, every=1, stream=stream) as bar:
        bar.update(2, loss=0.5)
    assert "2/2" in stream.getvalue() and "loss 0.5" in stream.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_loop_to_stop_and_the_former_handler_comes_back(number):
    former = signal.getsignal(number)
    with InterruptGuard() as guard:
        assert not guard.stops()
        os.kill(os.getpid(), number)
        assert guard.stops()
        assert guard.preempted == (number == signal.SIGTERM)
    assert signal.getsignal(number) is former


def test_of_several_processes_none_forgets_that_it_was_told_to_stop(monkeypatch):
    """JAX says so once, at one step; where a stage ends there, the next one must hear it, too."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 3)
    with InterruptGuard() as guard:
        assert [guard.stops() for _ in range(6)] == [False, False, True, True, True, True]
        assert guard.preempted


def test_a_second_interrupt_raises():
    with pytest.raises(KeyboardInterrupt), InterruptGuard():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_guard_does_nothing_outside_the_main_thread():
    seen = []

    def work():
        with InterruptGuard() as guard:
            seen.append(guard.stops())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_number_that_is_not_finite_stops_the_run_and_is_named():
    check_finite({"loss": 1.0, "stage": "warmup", "rows": 3}, 5, str)
    with pytest.raises(NotFiniteError, match="grad_norm is inf at step 6: .* diverged; do this"):
        check_finite({"loss": 1.0, "grad_norm": float("inf")}, 6, lambda: "do this")
    with pytest.raises(NotFiniteError, match="loss is nan at step 7"):
        check_finite({"loss": np.float32("nan")}, 7, str)


def test_the_advice_on_divergence_names_only_what_the_run_has():
    constant = {"schedule": ScheduleConfig(name="constant")}
    stage = StageConfig(steps=9, batch_size=1, learning_rate=1.0, **constant)
    plain = OptimizerConfig(clip_norm=None)
    assert divergence_advice(plain, stage, "stage") == (
        "train into another directory with a lower stage.learning_rate or optimizer.clip_norm=1"
    )
    ire = OptimizerConfig(learning_rate=1.0, ire=IREConfig(kappa=1e30))
    warm = dataclasses.replace(stage, schedule=ScheduleConfig())
    assert divergence_advice(ire, warm, "stages.warmup") == (
        "train into another directory with a lower optimizer.ire.kappa, "
        "a lower optimizer.learning_rate, a longer stages.warmup.schedule.warmup_steps "
        "or a smaller optimizer.clip_norm"
    )
