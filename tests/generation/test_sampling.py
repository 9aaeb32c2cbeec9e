"""What cannot be, said in one line."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from helpers.sampler_toys import MASK, WORDS, ToyPredictor, letters, random_model, toy
from llada_lightning.generation import Sampling, generate
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import warn_once

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llada", {"length": 0}, "length: 0 given"),
    ("llada", {"length": 2.5}, "length: 2.5 given"),
    ("llada", {"steps": 0}, "steps: 0 given"),
    ("llada", {"block_length": 5}, "the nearest lengths are 30 and 35"),
    ("llada", {"block_length": 64}, "the nearest lengths are 64"),
    ("llada", {"block_length": 8, "steps": 30}, "the nearest are 28 and 32"),
    ("llada", {"block_length": 8, "steps": 3}, "the nearest are 4"),
    ("llada", {"strategy": "beam"}, "'beam' is not known; choose from diffusion"),
    ("llada", {"remasking": "high"}, "remasking: 'high'"),
    ("llada", {"cache": "big"}, "cache: 'big'"),
    ("llada", {"cache": "kv"}, "prefix and dual"),
    ("llada", {"temperature": -1.0}, "temperature: -1.0"),
    ("llada", {"temperature": float("nan")}, "temperature: nan"),
    ("llada", {"top_k": 0}, "top_k: 0"),
    ("llada", {"top_p": 1.5}, "top_p: 1.5"),
    ("llada", {"cfg_scale": -0.5}, "cfg_scale: -0.5"),
    ("llada", {"threshold": 0.0}, "threshold: 0.0"),
    ("llada", {"threshold": 0.9, "steps": 8}, "leave one out"),
    (
        "llada",
        {"threshold": 0.9, "remasking": "entropy"},
        "threshold: the confidence of remasking 'entropy' is no share of 1",
    ),
    ("llada", {"threshold": 0.9, "remasking": "random"}, "knows no confidence"),
    ("llada", {"zero_eos_confidence": True, "remasking": "random_count"}, "knows no confidence"),
    ("llada", {"stop": [""]}, "stop: an empty string"),
    ("llada", {"strategy": "autoregressive", "block_length": 4}, "one token at a time"),
    ("llada", {"strategy": "autoregressive", "steps": 4}, "takes 32"),
    ("llada", {"compat": "gpt"}, "compat: 'gpt'"),
    ("llada", {"compat": "llada", "top_k": 3, "temperature": 1.0}, "has no such thing"),
    ("llada", {"compat": "llada", "cache": "dual"}, "has no such thing"),
    ("llada", {"compat": "llada", "remasking": "margin"}, "has no such thing"),
    ("llada", {"compat": "llada", "strategy": "block_diffusion"}, "has no such thing"),
    ("llada", {"length": 126}, "shorten the prompt by 1 tokens or set length to at most 125"),
    ("llada", {"top_p": 0.9}, "top_p: 0.9 does nothing at temperature 0"),
    ("arm", {"top_k": 3}, "top_k: 3 does nothing at temperature 0"),
    ("llada", {"temperature": 1e5}, "between 0 (greedy) and 1e4"),
    ("llada", {"strategy": "block_diffusion"}, "block_length: not given"),
    ("llada", {"stop": "a"}, "no tokenizer"),
    ("llada", {"batch_size": 0}, "batch_size: 0 given"),
    ("llada", {"batch_size": 1.5}, "batch_size: 1.5 given"),
    ("llada", {"first": -1}, "first: -1 given"),
    ("arm", {"infill": True}, "cannot see what stands behind a gap"),
    ("arm", {"strategy": "diffusion"}, "is an arm"),
    ("arm", {"cfg_scale": 1.0}, "is an arm"),
    ("arm", {"steps": 7}, "steps: 7 given; autoregressive sampling takes 32"),
    ("arm", {"remasking": "random"}, "is an arm"),
    ("arm", {"cache": "dual"}, "is an arm"),
    ("arm", {"compat": "llada"}, "is an arm"),
]


@pytest.mark.parametrize(("objective", "settings", "words"), BAD, ids=lambda x: str(x))
def test_settings_that_cannot_be(objective: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        generate(random_model(objective), [[5, 6, 7]], **{"length": 32, **settings})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([[5, MASK]], {}, "prompt 1: holds [MASK] (id 1) 1 times"),
        ([[5], [WORDS]], {}, f"prompt 2: token {WORDS} is outside"),
        ([[-1]], {}, "token -1 is outside"),
        ([[5]], {"infill": True}, "holds no [MASK]"),
        ([[MASK]], {"infill": True, "block_length": 1}, "all gaps of a text together"),
        ([[MASK]], {"infill": True, "cache": "dual"}, "cache 'dual'"),
        ([[MASK]], {"infill": True, "strategy": "block_diffusion"}, "strategy 'block_diffusion'"),
        ([[MASK] * 200], {"infill": True}, "200 tokens are more than the 128"),
        ([[MASK]], {"infill": True, "length": 8}, "length: 8 given; the gaps"),
        ([[5], [5] * 130], {"length": 8}, "on; shorten the prompt by 10 tokens"),
        ([], {}, "none given"),
        (torch.ones(1, 2, 3, dtype=torch.int64), {}, "shape (1, 2, 3)"),
        (torch.tensor(5), {}, "shape ()"),
        (torch.tensor([[5.7]]), {}, "torch.float32"),
        ([[5.7, 6.2]], {}, "prompt 1: [5.7, 6.2] given"),
        ([[5], None], {}, "prompt 2: None given"),
        ([5, [6]], {}, "prompt 1: 5 given"),
        (torch.tensor([[5, 6, 7]]), {"attention_mask": torch.tensor([[1, 0, 1]])}, "row 1 has a hole"),
        ("text", {}, "has no tokenizer"),
        ([[5]], {"attention_mask": torch.ones(1, 1)}, "no tensor"),
        (torch.ones(1, 2, dtype=torch.int64), {"attention_mask": torch.ones(1, 1)}, "shape (1, 1)"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be(prompts: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        generate(random_model(), prompts, **settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [
        ([[5]], {"length": 8}),
        ([[5]], {"length": 8, "block_length": 4}),
        ([[5]], {"length": 8, "block_length": 4, "strategy": "block_diffusion"}),
        ([[5]], {"length": 8, "remasking": "random_count"}),
        ([[5]], {"length": 8, "remasking": "margin", "cache": "dual"}),
        ([[5]], {"length": 8, "compat": "llada", "remasking": "random"}),
        ([[5, *[MASK] * 8], [MASK, 6, MASK]], {"infill": True}),
    ],
    ids=str,
)
def test_steps_that_reveal_nothing_are_said_once(
    prompts: list[list[int]], settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    warn_once.cache_clear()
    lm = random_model()
    more, again = (generate(lm, prompts, steps=98, **settings) for _ in range(2))
    assert capsys.readouterr().err == (
        "note: steps: 98 given for 8 tokens, and a step reveals at least one; 90 steps reveal nothing, so give at most "
        "8\n"
    )
    enough = generate(lm, prompts, steps=8, **settings)
    assert capsys.readouterr().err == ""
    if not str(settings.get("remasking")).startswith("random"):  # these draw noise in such steps, too
        assert more.tokens == again.tokens == enough.tokens


def test_a_finer_reverse_process_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    """With more steps fewer tokens appear in the same step (Algorithm 4)."""
    warn_once.cache_clear()
    coarse, fine = (generate(random_model(), [[]] * 50, length=8, steps=n, remasking="random") for n in (8, 800))
    alone = [sum(len(set(row)) == 8 for row in found.step_of_token) for found in (coarse, fine)]
    assert alone[0] < 10 and alone[1] > 40
    assert capsys.readouterr().err == ""


def test_settings_in_one_object_or_by_their_names() -> None:
    lm, prompts = random_model(), [[5, 6, 7], [8]]
    settings: dict[str, Any] = {"length": 8, "steps": 4, "temperature": 1.0, "seed": 3}
    whole = generate(lm, prompts, Sampling(**settings))
    assert whole.tokens == generate(lm, prompts, **settings).tokens
    assert whole.tokens == generate(lm, prompts, Sampling(**{**settings, "steps": 8}), steps=4).tokens
    expected = {"strategy": "diffusion", "block_length": 8, "cache": "none", "first": 0}
    assert whole.settings == vars(Sampling(**settings)) | expected
    with pytest.raises(TypeError, match=r"^generate: 'lenght' is no setting; the nearest is 'length'$"):
        generate(lm, prompts, lenght=8)
    with pytest.raises(TypeError, match=r"^generate: 'zzz' is no setting$"):
        generate(lm, prompts, zzz=8)


def test_settings_are_checked_before_there_is_a_model() -> None:
    assert Sampling(stop="ab") == Sampling(stop=["ab"]) and hash(Sampling(stop=["ab"]))
    assert Sampling(seed=1, stop="a").changes == {"seed": 1, "stop": ("a",)}
    with pytest.raises(UserError, match="temperature: -1 given"):
        Sampling(temperature=-1)


def test_settings_and_the_names_of_rules_need_no_torch() -> None:
    code = "import sys; from llada_lightning import Sampling; Sampling(remasking='entropy'); "
    assert subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"]).returncode == 0


def test_prompts_of_every_form() -> None:
    lm = random_model()
    forms: list[Any] = [[5, 6, 7], [[5, 6, 7]], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]]), ([5, 6, 7],)]
    forms += [np.array([5, 6, 7]), np.array([[5, 6, 7]]), list(np.array([5, 6, 7]))]
    answers = [generate(lm, form, length=8).tokens for form in forms]
    assert all(answer == answers[0] for answer in answers)


def test_a_stop_string_that_no_answer_can_spell() -> None:
    lm = toy(ToyPredictor(8), letters())
    with pytest.raises(UserError, match=r"stop: 'ab\[EOS\]' holds a special token"):
        generate(lm, [[2]], length=4, stop=["ab", "ab[EOS]"])


def test_a_path_is_no_model() -> None:
    with pytest.raises(UserError, match=r"lm: 'runs/tour/llada' given for the model; give what load_model"):
        generate("runs/tour/llada", [[5]], length=4)  # type: ignore[arg-type]
