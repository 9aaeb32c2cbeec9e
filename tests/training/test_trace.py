"""Facts of a trace that is written by hand, in which everything can be counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_lightning.training.trace import Event, Operation, _covered, read_trace, trace_facts


def event(name: str, category: str, start: float, end: float, thread: str = "1/1") -> Event:
    return Event(name, category, thread, start, end)


def test_a_callers_time_is_without_what_it_calls() -> None:
    facts = trace_facts(
        [
            event("aten::linear", "cpu_op", 0, 10_000),
            event("aten::mm", "cpu_op", 1_000, 7_000),
            event("aten::empty", "cpu_op", 1_000, 2_000),
            event("aten::mm", "cpu_op", 20_000, 21_000),
            event("aten::mm", "cpu_op", 500, 1_500, thread="1/2"),
            event("some python", "python_function", 0, 90_000),
        ]
    )
    assert facts.operations == [
        Operation("aten::mm", 5 + 1 + 1, 3),
        Operation("aten::linear", 4, 1),
        Operation("aten::empty", 1, 1),
    ]
    assert (facts.communication, facts.communication_alone, facts.device_busy) == (0, 0, None)


def test_communication_of_the_cpu_is_told_by_gloos_threads() -> None:
    facts = trace_facts(
        [
            event("aten::mm", "cpu_op", 0, 4_000),
            event("c10d::allreduce_", "cpu_op", 4_000, 4_500),
            event("gloo:all_reduce", "user_annotation", 3_000, 9_000, thread="1/2"),
            event("aten::add", "cpu_op", 8_000, 8_500),
            event("llada.backward", "user_annotation", 0, 10_000),
        ]
    )
    assert facts.communication == 6
    assert facts.communication_alone == 6 - 1 - 0.5


def test_on_a_gpu_its_kernels_count_and_not_what_asks_for_them() -> None:
    """Two queues: 6 ms of kernels and a copy, of which 2 ms of nccl run alone."""
    facts = trace_facts(
        [
            event("aten::mm", "cpu_op", 0, 50),
            event("gemm", "kernel", 1_000, 3_000, "0/7"),
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "kernel", 2_000, 5_000, "0/20"),
            event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 6_000, 7_000, "0/7"),
            event("gemm", "kernel", 8_000, 9_000, "0/7"),
            event("nccl:all_reduce", "user_annotation", 0, 90),
        ]
    )
    assert facts.operations[:2] == [
        Operation("gemm", 3, 2),
        Operation("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 3, 1),
    ]
    assert (facts.communication, facts.communication_alone, facts.device_busy) == (3, 2, 6)


def test_what_begins_in_an_annotation_can_be_left_out_on_either_side() -> None:
    facts = trace_facts(
        [
            event("llada.validation", "user_annotation", 0, 100),
            event("llada.validation", "gpu_user_annotation", 5_000, 7_000, "0/7"),
            event("gemm", "kernel", 50, 1_050, "0/7"),  # asked for before the validation
            event("gemm", "kernel", 5_000, 7_000, "0/7"),
        ],
        left_out="llada.validation",
    )
    assert facts.operations == [Operation("gemm", 1, 1)] and facts.device_busy == 1


def test_a_file_is_read_without_what_has_no_duration(tmp_path: Path) -> None:
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 2, "ts": 10.5, "dur": 2},
        {"ph": "i", "name": "a moment", "pid": 1, "tid": 2, "ts": 11},
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "python"}},
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert read_trace(path) == [Event("aten::mm", "cpu_op", "1/2", 10.5, 12.5)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_covered_time_is_that_of_the_union(spans: list[tuple[int, int]]) -> None:
    moments = {moment for start, length in spans for moment in range(start, start + length)}
    found = _covered([event("a", "kernel", start, start + length) for start, length in spans])
    assert found == pytest.approx(len(moments))
