"""Asking a model: what it is shown, what is read out of its answer, and the counting."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers.small_models import random_model
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import Shape
from llada_lightning.data.corpora import open_corpus
from llada_lightning.data.igsm import asked, document, problems, question, solution
from llada_lightning.evaluation.igsm import run
from llada_lightning.evaluation.igsm.prompts import SYSTEM, chat_messages, completion_prompt, shots
from llada_lightning.evaluation.igsm.run import IgsmSettings, answer_in, run_igsm
from llada_lightning.model import Transformer
from llada_lightning.support.errors import UserError

PROBLEMS = [next(problems(7 + i, steps=4 + i % 3, test=True)) for i in range(6)]


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_an_oracle_that_errs_twice_is_counted_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_model(tokenizer=_tokenizer())
    texts = [solution(problem) for problem in PROBLEMS]
    texts[0] = f"#### {(PROBLEMS[0].answer + 1) % 5}"  # of 4 steps
    texts[4] = "no answer"  # of 5 steps
    seen: list[str] = []

    def oracle(_: Any, prompts: list[list[int]], **sampling: Any) -> SimpleNamespace:
        seen.extend(lm.decode(prompt) for prompt in prompts)
        assert sampling == {"batch_size": 16, "length": 9, "stop": ["\nQuestion:"]}
        return SimpleNamespace(text=texts)

    monkeypatch.setattr(run, "generate", oracle)
    result = run_igsm(lm, PROBLEMS, IgsmSettings(sampling={"length": 9}))
    assert {steps: (a.correct, a.count) for steps, a in result.by_steps.items()} == {4: (1, 2), 5: (1, 2), 6: (2, 2)}
    assert result.overall.value == pytest.approx(4 / 6)
    assert result.overall.stderr == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    assert result.given.count(None) == 1
    assert all(text.startswith(SYSTEM) and text.count("####") == 5 for text in seen)  # the system prompt names one
    assert [text.endswith(asked(question(p))) for text, p in zip(seen, PROBLEMS, strict=True)] == [True] * 6


def test_prompts_hold_the_shots_asked_for() -> None:
    assert not any(shot.held_out for shot in shots())
    assert completion_prompt(PROBLEMS[0], 0, system=False) == asked(question(PROBLEMS[0]))
    assert document(shots()[0]) in completion_prompt(PROBLEMS[0], 1, system=False)
    roles = [message.role for message in chat_messages(PROBLEMS[0], 2, system=True)]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("text", "answer"), [("a = 3.\n#### 3", 3), ("#### 12", None), ("#### 7", None), ("####0.", 0), ("3", None)]
)
def test_the_answer_is_what_follows_the_mark(text: str, answer: int | None) -> None:
    assert answer_in(text) == answer


@pytest.mark.parametrize("objective", ["arm", "llada"])
def test_both_objectives_answer(objective: Any) -> None:
    model = Transformer(Shape(n_layers=1, d_model=32, n_heads=2, n_kv_heads=2, d_ff=64), 258)
    model.initialise(torch.Generator().manual_seed(0))
    start = 256 if objective == "arm" else None
    lm = LanguageModel(objective, model.eval(), 257, 256, 2048, _tokenizer(), start_token_id=start)
    result = run_igsm(lm, PROBLEMS, IgsmSettings(shots=0, system=False, sampling={"length": 4}))
    assert len(result.texts) == result.overall.count == 6
    assert result.given == [None] * 6  # 4 bytes of noise


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="none given"):
        run_igsm(random_model(), [])
    with pytest.raises(UserError, match="has no tokenizer"):
        run_igsm(random_model(), PROBLEMS)
    with pytest.raises(UserError, match="no chat template"):
        run_igsm(random_model(tokenizer=_tokenizer()), PROBLEMS, IgsmSettings(chat=True))
    with pytest.raises(UserError, match="give 0 to 4"):
        IgsmSettings(shots=5)
    with pytest.raises(UserError, match="at least 1"):
        IgsmSettings(batch_size=0)


def test_the_command_refuses_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["igsm", "nowhere", "--problems", "0"]) == 2
    assert "--problems 0: give at least 1" in capsys.readouterr().err


def test_the_corpus_is_of_the_size_and_seed_asked_for() -> None:
    corpus = open_corpus("igsm:50@3")
    assert list(corpus.documents()) == [document(p) for p in islice(problems(3), 50)]
    assert corpus.identity != open_corpus("igsm:50@4").identity
    for wrong in ("igsm", "igsm:", "igsm:0", "igsm:5@x"):
        with pytest.raises(UserError, match="write igsm:COUNT"):
            open_corpus(wrong)
