"""Steps of a fixed schedule: the host knows the numbers of a step, so that it need not wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.sampler_toys import EOS, MASK, ScriptedPredictor, letters, random_model, toy
from helpers.small_models import random_model as small_model
from llada_lightning.generation import ancestral, generate, reveal
from llada_lightning.generation.canvas import STEPS_LATE, Canvas, LateFlags, Places
from llada_lightning.generation.denoiser import BlockRows, Denoiser
from llada_lightning.generation.reveal import RULES, Rule, State, most_confident

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [4] * 12, []]
GAPS = [[5, MASK, MASK, 6, 7], [MASK] * 4 + [8, 9], [10, MASK] * 9]
CPU = torch.device("cpu")


class WaitError(Exception):
    """On a GPU the host would wait for the device here."""


class NeverWaits(TorchDispatchMode):
    """Refuses what reads a number of the device, or makes a tensor whose size depends on one."""

    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_dim", "_unique2", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.REFUSED:
            raise WaitError(name)
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            raise WaitError(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def refuse(*arguments: Any, **keywords: Any) -> Any:
    raise WaitError("a value is copied to the host")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """A function that lets nothing wait within a function; but for the flags of what has ended, which come late."""
    read = torch.Tensor.tolist
    monkeypatch.setattr(LateFlags, "exchange", lambda self, flags_B: read(flags_B))

    def watched(place: Any, name: str) -> None:
        original = getattr(place, name)

        def function(*arguments: Any) -> Any:
            with NeverWaits(), pytest.MonkeyPatch.context() as patch:
                for reading in ("tolist", "numpy", "cpu"):  # a mode does not see these on a CPU
                    patch.setattr(torch.Tensor, reading, refuse)
                return original(*arguments)

        monkeypatch.setattr(place, name, function)

    return watched


FIXED: list[dict[str, Any]] = [
    {},
    {"steps": 5},
    {"steps": 3, "temperature": 1.0, "top_p": 0.9, "top_k": 9},
    {"remasking": "margin", "steps": 4},
    {"remasking": "entropy", "steps": 4, "zero_eos_confidence": True},
    {"remasking": "random_count", "steps": 5, "temperature": 1.0},
    {"cfg_scale": 1.0, "steps": 4},
    {"block_length": 4, "steps": 8},
    {"block_length": 4, "steps": 8, "cache": "dual", "cfg_scale": 0.5},
    {"block_length": 4, "steps": 8, "cache": "prefix"},
    {"block_length": 4, "steps": 8, "strategy": "block_diffusion"},
]


@pytest.mark.parametrize("settings", FIXED, ids=str)
def test_no_step_waits_where_the_schedule_is_fixed(settings: dict[str, Any], watch: Callable[[Any, str], None]) -> None:
    expected = generate(random_model(), PROMPTS, length=16, **settings)
    watch(Denoiser, "_step")
    found = generate(random_model(), PROMPTS, length=16, **settings)
    assert (found.tokens, found.step_of_token, found.confidence) == (
        expected.tokens, expected.step_of_token, expected.confidence,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"steps": 3}, {"remasking": "random_count"}], ids=str)
def test_no_step_waits_where_each_text_has_as_many_steps_as_gaps(
    settings: dict[str, Any], watch: Callable[[Any, str], None]
) -> None:
    expected = generate(random_model(), GAPS, infill=True, **settings)
    watch(Denoiser, "_step")
    assert generate(random_model(), GAPS, infill=True, **settings).tokens == expected.tokens


@pytest.mark.parametrize("cache", ["kv", "none"])
def test_no_step_of_a_model_of_blocks_waits(cache: str, watch: Callable[[Any, str], None]) -> None:
    lm = small_model("block", block_length=4)
    watch(Denoiser, "_step")
    result = generate(lm, [[5, 6], [7] * 5, []], length=8, steps=4, cache=cache)  # type: ignore[arg-type]
    assert result.forward_passes >= 4


def test_no_step_of_random_tokens_waits(watch: Callable[[Any, str], None]) -> None:
    watch(ancestral, "_next_tokens")
    lm = small_model("uniform")
    assert generate(lm, [[5, 6], []], length=8, steps=6, temperature=1.0).forward_passes == 6


@pytest.mark.parametrize("settings", [{"threshold": 0.3}, {"remasking": "random"}, {"compat": "llada"}], ids=str)
def test_other_steps_wait(settings: dict[str, Any], watch: Callable[[Any, str], None]) -> None:
    """What they reveal depends on the predictions, or on chance. So the tests above can fail."""
    watch(Denoiser, "_step")
    with pytest.raises(WaitError):
        generate(random_model(), PROMPTS, length=16, **settings)


def test_a_choice_may_follow_the_schedule(watch: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def left_to_right(state: State) -> Tensor:
        return state.candidates_RK & (state.candidates_RK.cumsum(1) <= state.counts_R[:, None])

    for name, scheduled in (("counted", False), ("scheduled", True)):
        monkeypatch.setitem(RULES, name, Rule(choice=left_to_right, scheduled=scheduled))
    settings: dict[str, Any] = {"length": 16, "steps": 5, "temperature": 1.0}
    expected = generate(random_model(), PROMPTS, remasking="counted", **settings)
    watch(Denoiser, "_step")
    found = generate(random_model(), PROMPTS, remasking="scheduled", **settings)
    assert (found.tokens, found.step_of_token) == (expected.tokens, expected.step_of_token)


def test_the_host_knows_what_is_left_and_what_is_revealed() -> None:
    rows = BlockRows.of([0, 2, 3], [10, 3, 7], [4, 4, 7], CPU)
    assert [rows.left(step) for step in range(1, 5)] == [[10, 3, 7], [8, 3, 6], [5, 2, 5], [3, 1, 4]]
    for step in range(1, 5):
        after = rows.left(step + 1)
        assert rows.counts(step) == [a - b for a, b in zip(rows.left(step), after, strict=True)]
        assert rows.counts(step) == reveal.counts_to_keep(rows.masked_R, step, rows.steps_R).tolist()
    assert rows.part([2, 0]).rows_R.tolist() == rows.part([2, 0]).rows == [3, 0]


def test_a_candidate_of_no_confidence_is_one() -> None:
    confidence = torch.tensor([[0.5, -torch.inf, -torch.inf, 0.7]])
    candidates = torch.tensor([[False, False, True, True]])
    assert most_confident(confidence, candidates, torch.tensor([2])).tolist() == [[False, False, True, True]]


def test_only_what_is_kept_is_revealed() -> None:
    canvas = Canvas.of([[5], [6]], 3, MASK, CPU)
    places = Places([0, 0, 1], torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]))
    kept = torch.tensor([True, False, True])
    canvas.reveal(places, kept, torch.tensor([7, 8, 9]), torch.tensor([0.25, 0.5, 0.75]), torch.tensor([4, 4, 2]))
    assert canvas.tokens_BL.tolist() == [[5, 7, MASK, MASK], [6, MASK, MASK, 9]]
    assert canvas.masked_BL.tolist() == [[False, False, True, True], [False, True, True, False]]
    assert canvas.step_BL.tolist() == [[0, 4, -1, -1], [0, -1, -1, 2]]
    assert canvas.confidence_BL.tolist() == [[1, 0.25, 1, 1], [1, 1, 1, 0.75]]


# --- the flags of what has ended --------------------------------------------------------------------------------------


def test_flags_arrive_a_step_late_where_the_device_would_have_to_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [torch.tensor([False, step >= 2]) for step in range(4)]
    at_once = LateFlags(CPU)
    assert [at_once.exchange(flags) for flags in steps] == [flags.tolist() for flags in steps]
    monkeypatch.setitem(STEPS_LATE, "cpu", 1)
    late, flags = LateFlags(CPU), torch.tensor([False, False])
    found = []
    for step in range(4):
        flags[1] |= step >= 2  # in place, as the sampler does: what was handed over is as it was
        found.append(late.exchange(flags))
    assert found == [[False, False], [False, False], [False, False], [False, True]]


@pytest.mark.parametrize("settings", [*FIXED, {"threshold": 0.3, "block_length": 8}], ids=str)
@pytest.mark.parametrize("objective", ["llada", "arm"])
def test_answers_do_not_depend_on_when_their_end_is_known(
    objective: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = random_model(objective)
    settings = {"temperature": 1.0} if objective == "arm" else settings
    expected = generate(lm, PROMPTS, length=16, **settings)
    monkeypatch.setitem(STEPS_LATE, "cpu", 1)
    found = generate(lm, PROMPTS, length=16, **settings)
    assert (found.tokens, found.step_of_token, found.finish) == (
        expected.tokens, expected.step_of_token, expected.finish,
    )  # fmt: skip
    assert expected.forward_passes <= found.forward_passes <= expected.forward_passes + 1


def test_an_end_that_is_known_late_costs_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    script = [(2, 0.9), (3, 0.8), (EOS, 0.7), (4, 0.6), (6, 0.5), (7, 0.4)]
    lm = toy(ScriptedPredictor(script, 0), letters())

    def passes() -> int:
        result = generate(lm, [[]], length=6)
        assert result.text == ["ab"] and result.finish == ["eos"]
        return result.forward_passes

    assert passes() == 3
    monkeypatch.setitem(STEPS_LATE, "cpu", 1)
    assert passes() == 4


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"block_length": 3}], ids=str)
def test_stop_strings_end_an_answer_whenever_its_end_is_known(
    settings: dict[str, Any], late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEPS_LATE, "cpu", late)
    script = [(2, 0.9), (3, 0.8), (4, 0.7), (5, 0.6), (6, 0.5), (7, 0.4)]
    result = generate(toy(ScriptedPredictor(script, 0), letters()), [[]], length=6, stop=["bc"], **settings)
    assert result.text == ["a"] and result.finish == ["stop"]
    assert result.forward_passes == (3 if settings else 6)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", FIXED, ids=str)
def test_no_step_waits_for_a_gpu(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt: where rows leave, the places of the others are copied to the device."""
    step = Denoiser._step

    def watched(denoiser: Denoiser, rows: BlockRows, number: int) -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(denoiser, rows, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    lm = random_model().to("cuda")
    expected = generate(lm, PROMPTS[:1], length=16, **settings)
    monkeypatch.setattr(Denoiser, "_step", watched)
    assert generate(lm, PROMPTS[:1], length=16, **settings).tokens == expected.tokens
