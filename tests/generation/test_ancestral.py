"""The samplers of uniform-state diffusion: Bayes' rule, the distribution of what they draw, and their settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.exact_means import exact_mean
from helpers.small_models import MASK, ids, random_model
from llada_lightning.generation import generate
from llada_lightning.generation.ancestral import at_quantiles, next_probabilities, refine
from llada_lightning.generation.canvas import Canvas
from llada_lightning.generation.sampling import Sampling
from llada_lightning.support.errors import UserError


@pytest.mark.parametrize("levels", [(1.0, 0.75), (0.5, 0.25), (0.25, 0.0)])
def test_a_step_is_bayes_rule(levels: tuple[float, float]) -> None:
    """Of the chain from the mean to level s to level t, among four words and a [MASK]."""
    t, s = levels
    drawn_V = torch.tensor([True, True, False, True, True])
    p_V = torch.tensor([0.1, 0.5, 0.0, 0.1, 0.3], dtype=torch.float64)
    forward_V = (1 - s) * p_V + s / 4 * drawn_V
    kept = (1 - t) / (1 - s)
    kernel_VV = kept * torch.eye(5, dtype=torch.float64) + (1 - kept) / 4 * drawn_V
    joint_VV = forward_V[:, None] * kernel_VV
    for z in (0, 1, 3, 4):
        found_V = next_probabilities(p_V[None], torch.tensor([z]), levels, 1.0, drawn_V)[0]
        torch.testing.assert_close(found_V, joint_VV[:, z] / joint_VV[:, z].sum())
        mixed_V = next_probabilities(p_V[None], torch.tensor([z]), levels, 0.25, drawn_V)[0]
        torch.testing.assert_close(mixed_V, 0.25 * found_V + 0.75 * forward_V)
        assert found_V[2] == 0 and float(mixed_V.sum()) == pytest.approx(1)


def test_quantiles_never_take_what_has_no_probability() -> None:
    p_MV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64).expand(4, -1)
    uniform_M = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2.0**-53], dtype=torch.float64)
    assert at_quantiles(p_MV, uniform_M).tolist() == [1, 1, 3, 3]


class ExactModel:
    """The exact mean of small data at the level of each step, in the place of a Transformer."""

    def __init__(self, data: np.ndarray, steps: int) -> None:
        self.vocab_size, self._data, self._steps, self._passes = data.shape[0], data, steps, 0

    def hidden(self, tokens_BL: Tensor, **others: object) -> Tensor:
        mean = torch.tensor(exact_mean(self._data, 1 - self._passes / self._steps))
        self._passes += 1
        return mean[tuple(tokens_BL.T)]

    def head(self, hidden_MD: Tensor) -> Tensor:
        return hidden_MD


class Draws:
    """Uniform numbers of all rows at once."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def uniform(self, rows: list[int], candidates_RK: Tensor, counts: list[int], begin: int) -> Tensor:
        return torch.rand(candidates_RK.shape, dtype=torch.float64, generator=self._generator)


def chi_square(data: np.ndarray, kappa: float, steps: int, count: int = 20_000) -> float:
    """Of sampled sequences against the data, by the exact predictor."""
    length, words = data.ndim, data.shape[0]
    lm: Any = SimpleNamespace(model=ExactModel(data, steps), mask_token_id=None, device=torch.device("cpu"))
    canvas = Canvas.of([[]] * count, length, 0, torch.device("cpu"))
    settings = Sampling(length=length, steps=steps, temperature=1.0, kappa=kappa, strategy="ancestral")
    assert refine(lm, canvas, settings, Draws(), lambda step: None) == steps  # type: ignore[arg-type]
    found = np.bincount(np.ravel_multi_index(tuple(canvas.tokens_BL.numpy().T), data.shape), minlength=words**length)
    expected = count * data.ravel()
    return float((np.square(found - expected) / expected).sum())


@pytest.mark.parametrize("kappa", [1.0, 0.97])
def test_with_the_exact_mean_and_many_steps_the_data_is_drawn(kappa: float) -> None:
    data = np.random.default_rng(3).dirichlet(np.ones(9)).reshape(3, 3)
    assert chi_square(data, kappa, steps=100) < 26.1  # of 8 degrees, 1 in 1000
    assert chi_square(data, kappa, steps=1) > 1000  # both tokens at once, each by itself


@pytest.mark.parametrize("kappa", [1.0, 0.5, 0.0])
def test_one_token_is_drawn_exactly_in_any_number_of_steps(kappa: float) -> None:
    data = np.array([0.6, 0.3, 0.1])
    assert all(chi_square(data, kappa, steps) < 13.8 for steps in (1, 2, 5))


def test_an_answer_is_of_its_prompt_and_its_number() -> None:
    lm = random_model("uniform")
    prompts = [ids(3, 1), ids(7, 2), []]
    settings = {"length": 6, "steps": 5, "temperature": 1.0, "kappa": 0.9, "seed": 4}
    together = generate(lm, prompts, **settings)
    assert together.settings["strategy"] == "ancestral" and together.forward_passes == together.steps == 5
    for number, prompt in enumerate(prompts):
        alone = generate(lm, [prompt], first=number, **settings)
        assert alone.tokens[0] == together.tokens[number]
    assert all(MASK not in tokens and len(tokens) <= 6 for tokens in together.tokens)
    assert "ancestral, kappa 0.9, 5 steps, 5 forward passes" in together.facts
    assert generate(lm, prompts, **{**settings, "seed": 5}).tokens != together.tokens
    for steps, confidence in zip(together.step_of_token, together.confidence, strict=True):
        assert all(1 <= step <= 5 for step in steps) and all(0 < p <= 1 for p in confidence)


def test_at_temperature_0_the_last_step_takes_the_likeliest() -> None:
    lm, seen = random_model("uniform"), []
    found = generate(lm, [ids(3, 1)], length=4, steps=3, on_step=lambda snapshot: seen.append(snapshot.tokens[0]))
    logits_LV = lm.logits(torch.tensor([[*ids(3, 1), *seen[-2]]]))[0, 3:]
    whole = logits_LV[:, :MASK].argmax(dim=1).tolist()
    assert whole[: len(found.tokens[0])] == found.tokens[0] and seen[-1] == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"strategy": "diffusion"},
            "strategy 'diffusion': '.*' is of uniform, which denoises random tokens, all",
        ),
        ({"remasking": "random"}, "remasking 'random': '.*' is of uniform, .*; leave it out"),
        ({"cache": "prefix"}, "cache 'prefix': '.*' is of uniform"),
        ({"cfg_scale": 1.0}, r"cfg_scale 1\.0: '.*' is of uniform"),
        ({"block_length": 2}, "block_length: 2 given; ancestral sampling has no blocks; leave it out"),
        ({"kappa": 1.5}, r"kappa: 1\.5 given; it must lie in \[0, 1\], such as 0\.95"),
        ({"infill": True, "length": None}, "infill: '.*' is an uniform, which has no .MASK. to fill; leave it out"),
    ],
)
def test_what_it_lacks_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(random_model("uniform"), [[1, MASK]] if "infill" in settings else [[1]], **{"length": 4, **settings})


@pytest.mark.parametrize("objective", ["arm", "llada"])
def test_the_others_have_none_of_it(objective: str) -> None:
    for settings, name in (({"kappa": 0.9}, "kappa 0.9"), ({"strategy": "ancestral"}, "strategy 'ancestral'")):
        with pytest.raises(UserError, match=f"{name}: '.*' is of {objective}, which has no random tokens to denoise"):
            generate(random_model(objective), [[1]], length=4, **settings)
