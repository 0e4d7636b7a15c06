"""The reader of compiled programs, on texts written by hand."""

import pytest
from program_text import Program, async_bytes, kernels

TEXT = """HloModule jit_f, is_scheduled=true

%body (arg: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %arg = (s32[], bf16[64,128]{1,0}) parameter(0)
  %gte = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %copy-start.1 = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}, u32[]) copy-start(%gte)
  %copy-done.1 = bf16[8,128]{1,0:S(1)} copy-done(%copy-start.1)
  %fusion.1 = bf16[8,128]{1,0} fusion(%copy-done.1), kind=kLoop, calls=%inside, \
backend_config={"estimated_cycles":"1200"}
  %joined = bf16[8,128]{1,0} custom-call(%copy-done.1), custom_call_target="ConcatBitcast"
  %copy.9 = bf16[128,64]{0,1} copy(%gte), backend_config={"estimated_cycles":"30"}
  %pad.3 = f32[2,4]{1,0} pad(%fusion.1)
  %written = f32[1,4,2]{2,1,0} fusion(%pad.3), calls=%update
  %again = f32[4,2]{1,0} copy(%dynamic-update-slice.7), metadata={op_name="f/dynamic_update_slice"}
  %read = f32[4,2]{1,0} fusion(%dynamic-update-slice.7), calls=%inside
  %sum = bf16[64,128]{1,0} all-reduce(%gte), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %out = (s32[], bf16[64,128]{1,0}) tuple(%gte, %sum)
}

%update (q: f32[2,4]) -> f32[1,4,2] {
  %q = f32[2,4]{1,0} parameter(0)
  ROOT %d = f32[1,4,2]{2,1,0} dynamic-update-slice(%q, %q)
}

%inside (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %p = bf16[8,128]{1,0} parameter(0)
}

ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %while.1 = (s32[], bf16[64,128]{1,0}) while(%x), condition=%cond, body=%body, \
metadata={op_name="jit(f)/jit(step)/while"}, backend_config={"known_trip_count":{"n":"5"}}
  %gather = (bf16[64,32]{1,0}, bf16[64,128]{1,0}) all-gather-start(%x), \
replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %done = bf16[64,128]{1,0} all-gather-done(%gather)
}
"""


def test_the_kernels_of_a_loop() -> None:
    loop = Program(TEXT).loop("jit(step)/while")
    found = kernels(loop)
    names = ["fusion.1", "copy.9", "pad.3", "written", "again", "read", "sum"]
    assert [op.name for op in found] == names
    assert sum(op.cycles for op in found) == 1230
    assert async_bytes(loop) == 8 * 128 * 2
    with pytest.raises(ValueError, match="no loop 'elsewhere'"):
        Program(TEXT).loop("elsewhere")
    size = 64 * 128 * 2  # collectives count as often as their loops run
    sent = {"all-reduce": 5 * int(2 * 3 / 4 * size), "all-gather": int(3 / 4 * size)}
    assert Program(TEXT).collectives() == sent


def test_copies_of_kernels_and_caches() -> None:
    program = Program(TEXT)
    loop = program.loop("jit(step)/while")
    names = [op.name for op in program.whole_copies(loop, [(64, 128), (99, 99)], [(4, 2)])]
    assert names == ["copy.9", "pad.3", "again", "read", "sum"], "an update in place is no copy"
    assert program.whole_copies(loop, [(99, 99)], [(5, 2)]) == []


def test_what_crosses_slices_and_groups_of_all() -> None:
    text = """HloModule jit_f, num_partitions=4

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, u32[], token[]) send(%x), frontend_attributes={transfer_type="ALL_REDUCE"}
  %r = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}
"""
    assert Program(text).collectives() == {"between slices": 32, "all-reduce": 48}


def test_a_collective_that_is_spread_over_fusions_counts_once() -> None:
    gather = "all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}"
    text = f"""
%part (p: f32[2]) -> f32[8] {{
  ROOT %g = f32[8]{{0}} {gather}
}}

%rest (p: f32[2]) -> f32[8] {{
  ROOT %g.1 = f32[8]{{0}} {gather}
}}

ENTRY %main (x: f32[2]) -> f32[8] {{
  %f.1 = f32[8]{{0}} fusion(%x), calls=%part, metadata={{text="over
}}}}, lines"}}
  %f.2 = f32[8]{{0}} fusion(%x), calls=%rest
}}
"""
    assert Program(text).collectives() == {"all-gather": 8 * 4 * 3 // 4}
    for dtype, size in (("s4", 4), ("u4", 4), ("f8e4m3b11fnuz", 8), ("bf16", 16), ("pred", 8)):
        of_dtype = text.replace("f32[", f"{dtype}[")
        assert Program(of_dtype).collectives() == {"all-gather": 8 * size // 8 * 3 // 4}, dtype
