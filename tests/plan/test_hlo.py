"""Collectives read off a program's text."""

import pytest

from lorax.plan.hlo import collectives, summary

TEXT = """\
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %gathered = bf16[32,16]{1,0} all-gather(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %summed = (f32[4,2]{1,0}, f32[6]{0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%cond.1 (p: (s32[], bf16[8,16])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%branch (p: f32[8]) -> f32[4] {
  ROOT %scattered = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%other (p: f32[8]) -> f32[4] {
  ROOT %slice = f32[4]{0} slice(%p)
}

%fused_computation.1 (p: f32[8]) -> f32[16] {
  ROOT %named = f32[16]{0} all-gather(%n), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'x'}, metadata={id=3}
}

%async_collective_fusion.2 (p: f32[8]) -> f32[16] {
  ROOT %again = f32[16]{0} all-gather(%n), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'x'}, metadata={id=3}
}

%body.3 (p: (s32[], f32[3])) -> (s32[], f32[3]) {
  %exchanged = f32[3]{0} all-to-all(%v), channel_id=1, replica_groups={{0,1,2},{3,4,5}}
  %twice = f32[3]{0} all-to-all(%w), channel_id=1, replica_groups={{0,1,2},{3,4,5}}
}

%cond.3 (p: (s32[], f32[3])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(11)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

ENTRY %main.2 (a: bf16[8,16]) -> bf16[8,16] {
  %loop = (s32[], bf16[8,16]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %start = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[8,3]{1,0} all-gather-done(%start)
  %moved = (u8[10]{0}, u8[10]{0}, u32[], u32[]) collective-permute-start(%c), source_target_pairs={{0,1}}
  %choice = f32[4] conditional(%which, %p, %p), branch_computations={%branch, %other}
  %first = f32[16] fusion(%a), kind=kCustom, calls=%fused_computation.1
  %second = f32[16] fusion(%a), kind=kCustom, calls=%async_collective_fusion.2
  %plain = (s32[], f32[3]) while(%u), condition=%cond.3, body=%body.3, metadata={op_name="scan"}
  %all = f32[7]{0} all-reduce(%z), replica_groups={}, to_apply=%add
}
"""


def test_loops_count_as_often_as_they_turn_and_each_kind_has_its_bytes():
    found = collectives(TEXT, 8)
    by_kind = {}
    for one in found:
        by_kind.setdefault(one.kind, []).append(one)
    inner = next(one for one in by_kind["all-gather"] if one.times == 5)
    assert (inner.group, inner.bytes) == (4, 3 / 4 * 32 * 16 * 2)
    outer, named = (one for one in by_kind["all-gather"] if one.times == 1)
    assert outer.shapes == (("f32", (8, 3)),)
    assert (named.group, named.bytes) == (2, 32), "spread over two lines, and one collective"
    pair, everyone = sorted(by_kind["all-reduce"], key=lambda one: one.group)
    assert (pair.times, pair.bytes, pair.elements) == (5, 2 * 1 / 2 * 14 * 4, 8)
    assert (everyone.group, everyone.bytes) == (8, pytest.approx(2 * 7 / 8 * 28))
    assert [(one.times, one.bytes) for one in by_kind["all-to-all"]] == [(11, 8), (11, 8)]
    assert by_kind["reduce-scatter"][0].bytes == 16
    assert by_kind["collective-permute"][0].bytes == 10
    assert summary(found)["all-gather"] == {"count": 7, "bytes": 5 * inner.bytes + outer.bytes + 32}
