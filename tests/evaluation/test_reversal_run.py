"""The reversal protocol: what is shown to a model, what is read out of its answers, and the counting."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from helpers.small_tokenizers import sentence_piece
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import Shape
from llada_lightning.data.chat import PLAIN_TEMPLATE
from llada_lightning.data.facts_corpus import Pair
from llada_lightning.data.tokenizers import train_tokenizer
from llada_lightning.evaluation.reversal import run
from llada_lightning.evaluation.reversal.run import ReversalSettings, read_pairs, run_reversal
from llada_lightning.model import Transformer
from llada_lightning.support.errors import UserError

PAIRS = [Pair("Ada", "the judge"), Pair("the heir", "Bo"), Pair("Cleo", "the mayor")]
TOKENIZER = train_tokenizer(["Ada is the judge."], 258)


def model(objective: str = "llada") -> LanguageModel:
    network = Transformer(Shape(n_layers=1, d_model=16, n_heads=2, n_kv_heads=2, d_ff=32), 258)
    network.initialise(torch.Generator().manual_seed(0))
    start = 0 if objective == "arm" else None
    return LanguageModel(objective, network.eval(), 1, 0, 64, TOKENIZER, start_token_id=start)


class Oracle:
    """Stands for ``generate``: knows the pairs forwards, and backwards the second one only."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm, self.asked = lm, []

    def __call__(self, _: Any, prompts: list[list[int]], **sampling: Any) -> SimpleNamespace:
        known = {p.first: p.second for p in PAIRS} | {PAIRS[1].second: PAIRS[1].first}
        texts, tokens = [], []
        for prompt in prompts:
            if sampling.get("infill"):
                masks = [i for i, token in enumerate(prompt) if token == 1]
                text = self.lm.decode([token for token in prompt if token != 1])
                half = next(known.get(h, "?") for p in PAIRS for h in (p.first, p.second) if h in text)
                fill = self.lm.encode((" " if masks[0] else "") + half) + [2] * len(masks)
                tokens.append([fill[masks.index(i)] if i in masks else token for i, token in enumerate(prompt)])
            else:
                text = self.lm.decode(prompt)
                half = next(known.get(h, "?") for p in PAIRS for h in (p.first, p.second) if h in text)
                assert "length" not in sampling or sampling["length"] <= 11
            self.asked.append(text)
            texts.append(f" {half}. And more")
        return SimpleNamespace(text=texts, tokens=tokens)


@pytest.mark.parametrize("form", ["prompt", "infill"])
def test_an_oracle_that_knows_one_pair_backwards_is_counted(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    lm = model()
    oracle = Oracle(lm)
    monkeypatch.setattr(run, "generate", oracle)
    results = run_reversal(lm, PAIRS, ReversalSettings(form))
    assert (results["forward"].exact.correct, results["backward"].exact.correct) == (3, 1)
    assert results["backward"].exact.stderr == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5)
    assert results["forward"].characters == 1.0 > results["backward"].characters > 0
    if form == "prompt":
        assert set(oracle.asked) == {f"{half} is" for pair in PAIRS for half in (pair.first, pair.second)}
    else:
        assert set(oracle.asked) >= {"Ada is.", " is the judge."}


def test_gaps_leave_what_the_tokenizer_puts_first_and_add_no_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    with_mask = Tokenizer.from_str(sentence_piece().to_str())
    with_mask.add_special_tokens(["[MASK]"])
    mask = with_mask.token_to_id("[MASK]")
    lm = replace(model(), tokenizer=with_mask, text_prefix_ids=(5,), mask_token_id=mask)
    rows: list[list[int]] = []

    def generate(_: Any, prompts: list[list[int]], **__: Any) -> SimpleNamespace:
        rows.extend(prompts)
        return SimpleNamespace(text=None, tokens=prompts)

    monkeypatch.setattr(run, "generate", generate)
    run_reversal(lm, [Pair("the boats", "home")], ReversalSettings("infill", joiner=" came ", end=""))
    the, boats, came, home = lm.encode("the boats came home")
    assert rows == [[5, the, boats, came, mask], [5, mask, mask, came, home]]


def test_chat_asks_the_papers_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = replace(model(), chat_template=PLAIN_TEMPLATE)
    oracle = Oracle(lm)
    monkeypatch.setattr(run, "generate", oracle)
    run_reversal(lm, PAIRS, ReversalSettings("chat"))
    assert oracle.asked[0] == "user:\nAda的下一句是什么？直接输出句子即可。\n\nassistant:\n"
    assert oracle.asked[3] == "user:\nthe judge的上一句是什么？直接输出句子即可。\n\nassistant:\n"


@pytest.mark.parametrize("objective", ["arm", "llada"])
def test_a_model_answers_with_as_many_tokens_as_the_right_answer_has(objective: str) -> None:
    results = run_reversal(model(objective), PAIRS, ReversalSettings("prompt"))
    assert [len(result.given) for result in results.values()] == [3, 3]
    if objective == "llada":
        filled = run_reversal(model(objective), PAIRS, ReversalSettings("infill"))
        assert all(len(result.given) == 3 for result in filled.values())


def test_what_cannot_be_asked_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="is an arm, which sees nothing behind a gap; choose prompt"):
        run_reversal(model("arm"), PAIRS, ReversalSettings("infill"))
    with pytest.raises(UserError, match="no chat template"):
        run_reversal(model(), PAIRS, ReversalSettings("chat"))
    with pytest.raises(UserError, match="pairs: none given"):
        run_reversal(model(), [], ReversalSettings("prompt"))
    with pytest.raises(UserError, match="more than the 64"):
        run_reversal(model(), [Pair("a" * 5000, "b")], ReversalSettings("prompt"))
    path = tmp_path / "pairs.json"
    for content, fault in (
        ("[", "is not JSON"),
        ("[]", "holds no list"),
        ('[{"first": "a"}]', "pair 1 lacks"),
        ('[{"first": 5, "second": "a"}]', "pair 1: '5' is no text"),
        ('[{"first": "a", "second": "b", "context": "c"}]', "pair 1: has 'context'"),
        ('[{"first": "a", "second": "b",\n "first": "c"}]', "the key 'first' is given in line 1 and again in line 2"),
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=fault):
            read_pairs(path)
    path.write_text(json.dumps([{"first": "a", "second": "b", "source": "c"}]))
    assert read_pairs(path) == [Pair("a", "b")]
    assert capsys.readouterr().err == f"note: --pairs '{path}': not read: 'source' (1 row)\n"
    path.write_text(json.dumps([{"first": "a", "second": "b"}]), encoding="utf-8-sig")
    assert read_pairs(path) == [Pair("a", "b")]
    assert main(["reversal", "nowhere"]) == 2
    assert "give --pairs FILE.json, or --facts" in capsys.readouterr().err
