"""What is read from the text of a compiled program, on a small one written by hand."""
# ruff: noqa: E501 - the compiler's lines are as long as they are

import pytest

from jaxlab.preflight.collectives import collectives
from jaxlab.preflight.hlo import parse, runs
from jaxlab.preflight.traffic import compiled_flops, memory_traffic

# A loop of five rounds that gathers a weight over all four devices and multiplies; then a sum over
# pairs of devices; and a branch that is rarely taken.
MODULE = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/jaxlab/models/decoder.py"

FunctionNames
1 "decoder"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=4 end_column=9}

StackFrames
1 {file_location_id=1 }

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (arg: (s32[], bf16[8,16], bf16[4,16])) -> (s32[], bf16[8,16], bf16[4,16]) {
  %arg = (s32[], bf16[8,16]{1,0}, bf16[4,16]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%arg), index=0
  %rows = bf16[8,16]{1,0} get-tuple-element(%arg), index=1
  %shard = bf16[4,16]{1,0} get-tuple-element(%arg), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%count, %one)
  %weight = bf16[16,16]{1,0} all-gather(%shard), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, metadata={op_name="jit(step)/while/body/dot" stack_frame_id=1}
  %product = bf16[8,16]{1,0} dot(%rows, %weight), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], bf16[8,16]{1,0}, bf16[4,16]{1,0}) tuple(%next, %product, %shard)
}

%condition (arg.1: (s32[], bf16[8,16], bf16[4,16])) -> pred[] {
  %arg.1 = (s32[], bf16[8,16]{1,0}, bf16[4,16]{1,0}) parameter(0)
  %count.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%count.1, %limit), direction=LT
}

%often (x: bf16[8,16]) -> bf16[8,16] {
  ROOT %x = bf16[8,16]{1,0} parameter(0)
}

%rarely (y: bf16[8,16]) -> bf16[8,16] {
  %y = bf16[8,16]{1,0} parameter(0)
  %square = bf16[16,16]{1,0} dot(%y, %y), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  ROOT %again = bf16[8,16]{1,0} dot(%y, %square), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (rows.1: bf16[8,16], shard.1: bf16[4,16], which: pred[]) -> f32[8] {
  %rows.1 = bf16[8,16]{1,0} parameter(0)
  %shard.1 = bf16[4,16]{1,0} parameter(1)
  %which = pred[] parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,16]{1,0}, bf16[4,16]{1,0}) tuple(%zero, %rows.1, %shard.1)
  %loop = (s32[], bf16[8,16]{1,0}, bf16[4,16]{1,0}) while(%start), condition=%condition, body=%body
  %made = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
  %chosen = bf16[8,16]{1,0} conditional(%which, %made, %made), true_computation=%rarely, false_computation=%often
  %single = f32[8]{0} fusion(%chosen), kind=kLoop, calls=%sum
  ROOT %total = f32[8]{0} all-reduce(%single), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%sum
}
"""
MESH = {"data": 2, "fsdp": 2}


def test_a_loop_counts_its_rounds_and_a_branch_its_share():
    module = parse(MODULE)
    times = {run.computation.name: run.times for run in runs(module, rare=0.1)}
    assert times == {"main": 1, "body": 5, "rarely": 0.1, "often": 0.9}


def test_collectives_have_their_axes_bytes_and_number():
    found = {one.kind: one for one in collectives(parse(MODULE), MESH)}
    gathered, summed = found["all-gather"], found["all-reduce"]
    assert (gathered.axes, gathered.size, gathered.count) == ("data+fsdp", 4, 5)
    # 16 x 16 numbers of two bytes, of which three quarters come from elsewhere, five times.
    assert (gathered.bytes, gathered.sent) == (5 * 512, 5 * 384)
    assert (summed.axes, summed.size, summed.count) == ("fsdp", 2, 1)
    assert (summed.bytes, summed.sent) == (32, 32)


def test_products_count_two_for_a_multiply_add():
    once = 2 * 8 * 16 * 16
    assert compiled_flops(parse(MODULE), rare=0.25) == 5 * once + 0.25 * 2 * once


def test_main_memory_is_read_and_written_by_what_is_not_fused():
    body = 4 + 4 + 4  # the counter's sum, of which the constant is read as well
    body += (512 + 128) + (256 + 512 + 256)  # gather; product
    rest = (256 + 32) + (32 + 32)  # fusion; sum
    assert memory_traffic(parse(MODULE), rare=0.0) == 5 * body + rest


def test_an_instruction_knows_where_it_was_traced():
    module = parse(MODULE)
    gather = module.computations["body"].by_name["weight"]
    (frame,) = module.stack(gather)
    assert (frame.file, frame.line) == ("/somewhere/jaxlab/models/decoder.py", 42)


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing\n")
