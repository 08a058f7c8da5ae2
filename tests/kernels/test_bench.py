"""The benchmark's commands, timing and readings, on a CPU and on made-up machine code."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import bench, static_bench, timing, tpu_compiler
from kernels_pallas.gpu_attention import causal_pairs, visible_pairs
from kernels_pallas.gpu_bench import aims, gpu_report
from kernels_pallas.gpu_sizes import Sizes
from kernels_pallas.timing import Plan, contest, jax_timer

TINY = Sizes(
    attention=((16, 16),),
    tokens=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    chunk=4,
    band=2,
    slots=3,
    preface=2,
    decode_batches=(3,),
    decode_lengths=(8,),
    decode_slots=4,
    cold_bytes=0,
    references=4,
    reference_tokens=16,
    kept=3,
    layers=2,
    bank_slots=20,
    codebook_bits=(3, 2),
    copy_bytes=1 << 12,
    repetitions=2,
    run_seconds=0.0,
)


# Times on a GPU


@pytest.fixture(scope="module")
def report():
    lines = []
    found = gpu_report(lines.append, TINY, platform="cpu", torch_device="cpu")
    return json.loads(json.dumps(found)), lines


def test_report_has_a_row_for_every_comparison_and_a_line_for_every_row(report):
    found, lines = report
    named = [(row["op"], row.get("direction"), row.get("batch")) for row in found["rows"]]
    assert named == [
        ("memory_attention", "forward", 2),
        ("memory_attention", "backward", 2),
        ("memory_select", None, None),
        ("memory_dequantize", None, None),
        ("memory_decode", None, 3),
    ]
    assert len(lines) == 2 + len(named)
    assert found["machine"]["platform"] == "cpu" and found["copy"]["bytes_per_second"] > 0
    for row in found["rows"]:
        assert row["implementation"] == "xla"
        for name in ("ours", "xla"):
            timed = row["contestants"][name]
            assert 0 < timed["min"] <= timed["seconds"] <= timed["max"]
            assert timed["repetitions"] == 2 and timed["temporary_bytes"] >= 0
        assert row["contestants"]["ours"]["difference"] == 0


def test_what_raises_is_recorded_and_the_others_are_timed(report):
    rows = report[0]["rows"][:2]
    for row in rows:
        assert "cuDNN" in row["contestants"]["cudnn"]["error"]
        assert "speed over cudnn" not in row and row["speed over torch"] > 0
        assert row["contestants"]["torch"]["tflops"] > 0
        assert row["temporary memory of xla over ours"] == 1


def test_figures_of_each_op_follow_from_its_seconds(report):
    forward, backward, select, dequantize, decode = report[0]["rows"]
    for row, each in ((forward, 4), (backward, 10)):
        ours, torch = row["contestants"]["ours"], row["contestants"]["torch"]
        pair = each * 16 * 4 * 2
        flops = pair * visible_pairs(TINY, 16)
        assert ours["tflops"] == pytest.approx(flops / ours["seconds"] / 1e12)
        flops = pair * causal_pairs(16 + 2 + 2 * 3)
        assert torch["tflops"] == pytest.approx(flops / torch["seconds"] / 1e12)
    for row in (select, dequantize):
        ours = row["contestants"]["ours"]
        assert ours["references_per_second"] == pytest.approx(4 / ours["seconds"])
    ours, bare = (decode["contestants"][name] for name in ("ours", "ours, no slots"))
    # Keys and values of 2 heads of 16 in bfloat16: three caches, one preface, three groups of slots
    # with their validity; three queries, results and lengths.
    assert bare["floor_bytes"] == 2 * (3 * 8 + 2) * 32 * 2 + 3 * (2 * 4 * 16 * 2 + 4)
    assert ours["floor_bytes"] == bare["floor_bytes"] + 3 * (2 * 4 * 32 * 2 + 4 * 2)
    assert decode["time added by slots"] == pytest.approx(ours["seconds"] / bare["seconds"] - 1)
    bandwidth = report[0]["copy"]["bytes_per_second"]
    share = ours["floor_bytes"] / ours["seconds"] / bandwidth
    assert ours["share of copy bandwidth"] == pytest.approx(share)


def test_a_row_that_cannot_be_made_does_not_stop_the_others(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    sizes = Sizes(**{**vars(TINY), "attention": (), "decode_batches": ()})
    monkeypatch.setattr("kernels_pallas.gpu_bench._select_row", broken)
    rows = gpu_report(lambda _: None, sizes, platform="cpu")["rows"]
    assert rows[0] == {"error": "RuntimeError: out of memory"}
    assert rows[1]["op"] == "memory_dequantize" and len(rows) == 2


@pytest.mark.parametrize("queries", [4, 12, 16])
def test_pairs_are_those_of_a_loop_over_queries_and_keys(queries):
    wanted = 0
    for query in range(queries):
        chunk = max(query - 1, 0) // 4
        slots = sum(3 for other in range(queries // 4) if 0 <= chunk - other < 2)
        wanted += 2 + slots + sum(key <= query for key in range(queries))
    assert visible_pairs(TINY, queries) == wanted


def test_a_longer_causal_row_has_as_many_pairs_as_the_paper_s_memory_adds():
    extra = 3 + 5 * 8
    ratio = causal_pairs(2048 + extra) / visible_pairs(Sizes(), 2048)
    assert 1 <= ratio < 1.005


def test_aims_take_the_figures_that_there_are():
    rows = [
        {"error": "RuntimeError"},
        {"op": "memory_attention", "direction": "forward", "queries": 2, "speed over cudnn": 0.85},
        {"op": "memory_attention", "direction": "backward", "speed over cudnn": 0.7},
        {
            "op": "memory_decode",
            "time added by slots": 0.04,
            "contestants": {"ours": {"share of copy bandwidth": 0.9}},
        },
        {"op": "memory_decode", "contestants": {"ours": {"error": "RuntimeError"}}},
    ]
    assert [(aim["value"], aim["aim"], aim["reached"]) for aim in aims(rows)] == [
        (0.85, 0.85, True),
        (0.7, 0.75, False),
        (0.9, 0.8, True),
        (0.04, 0.03, False),
    ]


# Timing


def ticking():
    """A clock that shows one second more each time."""
    seconds = iter(range(10**6))
    return lambda: float(next(seconds))


def test_contestants_take_turns_and_one_that_raises_is_out():
    turns = []

    def contestant(name, seconds, fails_at=None):
        def timer():
            turns.append(name)
            if turns.count(name) == fails_at:
                raise RuntimeError(f"{name} broke")
            return seconds[turns.count(name) - 1]

        return lambda: timer

    def unmade():
        raise NotImplementedError("made for another platform")

    prepare = {
        "a": contestant("a", [9, 3, 1, 2]),
        "never": unmade,
        "cold": contestant("cold", [], fails_at=1),
        "b": contestant("b", [9, 5], fails_at=3),
    }
    found = contest(prepare, Plan(3, 1.0, deadline=100.0, clock=ticking()))
    assert "".join(turn for turn in turns if turn != "cold") == "ab" + "ab" + "ab" + "a"
    assert found == {
        "a": {"seconds": 2, "min": 1, "max": 3, "repetitions": 3},
        "never": {"error": "NotImplementedError: made for another platform"},
        "cold": {"error": "RuntimeError: cold broke"},
        "b": {"error": "RuntimeError: b broke"},
    }


def test_nothing_begins_after_the_deadline():
    prepare = {name: lambda: lambda: 1.0 for name in "abc"}
    found = contest(prepare, Plan(1, 1.0, deadline=1.0, clock=ticking()))
    assert [("error" in found[name]) for name in "abc"] == [False, False, True]


def test_each_step_of_the_loop_starts_from_the_last_and_takes_the_next_variant():
    seen = []

    def step(variant, state):
        jax.debug.callback(lambda *pair: seen.append([int(x) for x in pair]), variant, state)
        return state + variant, state * variant

    plan = Plan(1, run_seconds=6.0, deadline=0.0, clock=ticking())
    timer = jax_timer(step, [jnp.int32(1), jnp.int32(10)], jnp.int32(0), guess=1.0, plan=plan)
    assert timer() == 1 / 6
    jax.effects_barrier()
    assert sorted(seen) == sorted([1, 11 * n] for n in range(3)) + sorted(
        [10, 11 * n + 1] for n in range(3)
    )


def test_no_product_of_a_step_is_dead_code_or_shared():
    variants = [jnp.full((4, 4), number, jnp.float32) for number in (1, 2)]

    def step(variant, state):
        return state + (state @ variant)[0, 0], variant @ state

    compiled = []

    class Recorder:
        def __init__(self, function):
            self.function = function

        def lower(self, *arguments):
            lowered = jax.jit(self.function).lower(*arguments)
            compiled.append(lowered.compile().as_text())
            return lowered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "jax", _With(jax, jit=Recorder))
        plan = Plan(1, run_seconds=8.0, deadline=0.0)
        jax_timer(step, variants, jnp.ones((4, 4)), guess=1.0, plan=plan)
    body = compiled[0]
    assert body.count(" dot(") == 4, body


class _With:
    """A module with some names replaced."""

    def __init__(self, module, **names):
        self.__dict__.update(vars(module) | names)


@pytest.mark.parametrize(
    ("seconds", "guess", "together", "wanted"),
    [(1.0, 0.1, 2, 10), (1.0, 10.0, 2, 2), (1.0, 1e-9, 2, 256), (0.0, 1.0, 16, 16)],
)
def test_operations_of_a_turn_are_multiples_within_bounds(seconds, guess, together, wanted):
    assert Plan(1, seconds, 0.0).operations(guess, together) == wanted


def test_differences_are_relative_for_numbers_and_shares_for_indices():
    assert timing.difference(jnp.array([1.0, 3.0]), jnp.array([1.0, 4.0])) == 0.25
    assert timing.difference(jnp.array([1, 2, 3, 4]), jnp.array([1, 2, 3, 5])) == 0.25
    assert timing.difference([jnp.zeros(1)] * 2, [jnp.ones(1), -jnp.ones(1)]) == 1


# The command


def test_without_a_gpu_one_line_names_the_static_figures_and_nothing_is_written(
    tmp_path, monkeypatch
):
    target = tmp_path / "deep" / "times.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(target)])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    line = ended.value.code
    assert line.startswith("error: timing needs a GPU") and "--static" in line
    assert "\n" not in line and not list(tmp_path.iterdir())


# Static figures

HEADER = """\
== Static utilization ==
MXU  XLU  VALU  VPOP  EUP  VLOAD  FILL  VSTORE  SPILL  SALU
  2    3     4    5    1    3     3       1      1       2
"""
# Bundle by bundle: matrix slots, fills and spills are what is read.
USED = [
    "0 0 1 0 0 0 0 0 0 1",
    "2 0 0 0 0 1 1 0 0 0",
    "1 0 0 0 0 0 0 1 1 0",
    "1 0 0 0 0 1 1 1 0 0",
    "0 0 0 0 0 0 0 0 0 2",
    "1 0 0 0 0 0 0 1 1 0",
]
PROGRAM = """\
// a comment: 7
     0   :  { sadd }
   0x1 LH :  { vmatmul }
   0x2   :  { vmatmul }
   0x3   :  { vmatmul }
   0x4 LE :  { branch }
   0x5 PF :  { vmatmul }
"""
ORIGINAL = """\
%0 = alloc space=vmem, size = 0x1000, scoped
%1 = alloc space=vmem, size = 0x20, scoped
%2 = alloc space=smem, size = 0x400, scoped
%3 = alloc space=vmem, size = 0x8000, fixed
"""


def made_up_dump(folder):
    files = {
        "12-my_kernel.1-70-final_bundles.txt": PROGRAM,
        "12-my_kernel.1-71-schedule-analysis_final_bundles.txt": "total: 6",
        "12-my_kernel.1-69-final_hlo-static-per-bundle-utilization.txt": HEADER + "\n".join(USED),
        "12-my_kernel.1-02-original.txt": ORIGINAL,
        "13-half-70-final_bundles.txt": PROGRAM,
        "13-half-69-final_hlo-static-per-bundle-utilization.txt": HEADER + "\n".join(USED),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_kernels_are_read_from_what_the_compiler_dumps(tmp_path):
    (kernel,) = tpu_compiler.read_kernels(made_up_dump(tmp_path), "my_kernel")
    assert kernel.name == "my_kernel.1" and kernel.bundles == 6
    assert kernel.vmem_bytes == 0x1020
    assert kernel.regions == (
        tpu_compiler.Region(first=0, bundles=1, mxu=0.0, spills=0, fills=0),
        tpu_compiler.Region(first=1, bundles=3, mxu=4 / 6, spills=1, fills=2),
        tpu_compiler.Region(first=4, bundles=1, mxu=0.0, spills=0, fills=0),
        tpu_compiler.Region(first=5, bundles=1, mxu=1 / 2, spills=1, fills=0),
    )
    assert [region.first for region in kernel.hot] == [1, 5]


def test_kernels_of_other_names_or_with_parts_missing_are_left_out(tmp_path):
    assert tpu_compiler.read_kernels(made_up_dump(tmp_path), "no such") == []
    assert [kernel.name for kernel in tpu_compiler.read_kernels(tmp_path)] == ["my_kernel.1"]


def test_summary_sets_ours_against_the_best_public_kernel_of_chip_and_direction():
    def ours(chip, case, bundles):
        return {
            "op": "memory_attention",
            "chip": chip,
            "case": case,
            "pass_bundles": bundles,
        }

    def peer(chip, backward, bundles, source="tokamax"):
        return {
            "chip": chip,
            "backward": backward,
            "pass_bundles": bundles,
            "source": source,
            "blocks": (512, 512, 512),
        }

    rows = [
        ours("v5e", "heads of 128", 900),
        ours("v5e", "heads of 128, no memory", 800),
        ours("v5e", "heads of 128 backward", 3300),
        ours("v5e", "heads of 128, no memory, backward", 3000),
        ours("v5e", "paper", 1),
        ours("v6e", "heads of 128", 600),
    ]
    peers = [
        peer("v5e", False, 1000, "jax"),
        peer("v5e", False, 1200),
        peer("v5e", True, 3000),
        peer("v6e", False, 500),
    ]
    found = static_bench.summary(rows, peers)
    assert [(row["chip"], row["direction"], row["case"], row["ratio"]) for row in found] == [
        ("v5e", "forward", "heads of 128", 0.9),
        ("v5e", "forward", "heads of 128, no memory", 0.8),
        ("v5e", "backward", "heads of 128 backward", 1.1),
        ("v5e", "backward", "heads of 128, no memory, backward", 1.0),
        ("v6e", "forward", "heads of 128", 1.2),
    ]
    assert found[0]["best_public"] == "jax (512, 512, 512)"
    assert found[0]["best_public_pass"] == 1000 and found[0]["pass_bundles"] == 900
