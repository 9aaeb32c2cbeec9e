"""iGSM and reversal as tasks: what a model is shown, what is read out of its answers, and the counting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers.small_models import random_model
from helpers.small_tokenizers import sentence_piece

pytest.importorskip("lm_eval")

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.commands.main import main
from llada_lightning.compute.shapes import Shape
from llada_lightning.data.chat import PLAIN_TEMPLATE, Message
from llada_lightning.data.corpora import open_corpus
from llada_lightning.data.generated import Fact, asked, document, problems, question, solution
from llada_lightning.data.tokenizers import train_tokenizer
from llada_lightning.evaluation import harness
from llada_lightning.evaluation.benchmarks import load_benchmark, measure, task_manager
from llada_lightning.evaluation.harness import HarnessModel
from llada_lightning.evaluation.protocols import SYSTEM, answer_in, read_halves, reversal_documents, shots
from llada_lightning.evaluation.suites import Benchmark, Outcome
from llada_lightning.generation.prompts import conversation_ids
from llada_lightning.generation.sampler import generate
from llada_lightning.model import Transformer
from llada_lightning.support.errors import UserError

PAIRS = [Fact("Ada", "the judge"), Fact("the heir", "Bo"), Fact("Cleo", "the mayor")]
TOKENIZER = train_tokenizer(["Ada is the judge."], 258)


def model(objective: str = "llada", context: int = 64) -> LanguageModel:
    network = Transformer(Shape(n_layers=1, d_model=16, n_heads=2, n_kv_heads=2, d_ff=32), 258)
    network.initialise(torch.Generator().manual_seed(0))
    start = 0 if objective == "arm" else None
    return LanguageModel(objective, network.eval(), 1, 0, context, TOKENIZER, start_token_id=start)


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def outcomes(
    lm: LanguageModel,
    task: str,
    metadata: Mapping[str, Any],
    chat: bool = False,
    shots: int | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> list[Outcome]:
    benchmark = Benchmark(task, task, shots=shots)
    manager = task_manager([benchmark], None, {**metadata, "chat": chat})
    loaded = load_benchmark(manager, benchmark, unsafe_code=False)
    return measure(HarnessModel(lm), loaded, chat=chat, sampling=sampling)


# --- iGSM -------------------------------------------------------------------------------------------------------------


def test_an_oracle_that_errs_twice_is_counted_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {n: list(islice(problems(7, steps=n, test=True), 2)) for n in (4, 5, 6)}
    answers = {n: [solution(problem) for problem in each] for n, each in drawn.items()}
    answers[4][0] = f"#### {(drawn[4][0].answer + 1) % 5}"
    answers[5][1] = "no answer"
    lm = replace(random_model(tokenizer=byte_tokenizer()), context_length=9999)
    seen: list[str] = []

    def oracle(_: Any, prompts: list[list[int]], **sampling: Any) -> SimpleNamespace:
        assert (sampling["length"], sampling["stop"]) == (9, ["\nQuestion:"])
        seen.extend(lm.decode(prompt) for prompt in prompts)
        known = {asked(question(p)): text for n in drawn for p, text in zip(drawn[n], answers[n], strict=True)}
        return SimpleNamespace(text=[known[next(q for q in known if lm.decode(p).endswith(q))] for p in prompts])

    monkeypatch.setattr(harness, "generate", oracle)
    (found,) = outcomes(lm, "igsm", {"problems": 2, "problem_seed": 7}, sampling={"length": 9})
    assert (found.metric, found.value, found.n, found.shots) == ("exact_match,none", pytest.approx(4 / 6), 6, 4)
    assert [part["exact_match,none"]["value"] for part in found.parts.values()] == [0.5, 0.5, 1.0]
    assert found.parts["igsm_4"]["exact_match,none"]["stderr"] == pytest.approx(0.5)  # of two: 1 and 0
    assert found.metrics["unanswered,none"]["value"] == pytest.approx(1 / 6)
    assert found.sampling == {"length": 9, "steps": 9}
    assert len(seen) == 6
    shown = [document(shot) for shot in shots()]
    for text, problem in zip(seen, [p for n in drawn for p in drawn[n]], strict=True):
        assert text == "\n\n".join([SYSTEM, *shown, asked(question(problem))])
    assert not any(shot.held_out for shot in shots())


def test_igsm_asks_with_fewer_shots_without_the_system_prompt_and_in_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = replace(random_model(tokenizer=byte_tokenizer()), context_length=9999, chat_template=PLAIN_TEMPLATE)
    seen: list[list[int]] = []

    def oracle(_: Any, prompts: list[list[int]], **__: Any) -> SimpleNamespace:
        seen.extend(prompts)
        return SimpleNamespace(text=["#### 1"] * len(prompts))

    monkeypatch.setattr(harness, "generate", oracle)
    problem = next(problems(0, steps=5, test=True))
    outcomes(lm, "igsm_5", {"problems": 1, "system": False}, shots=1)
    assert lm.decode(seen.pop()) == f"{document(shots()[0])}\n\n{asked(question(problem))}"
    outcomes(lm, "igsm_5", {"problems": 1}, chat=True, shots=2)
    turns = [Message("system", SYSTEM)]
    for shot in shots()[:2]:
        turns += [Message("user", question(shot)), Message("assistant", solution(shot))]
    assert seen.pop() == conversation_ids(lm, [*turns, Message("user", question(problem))])


@pytest.mark.parametrize(
    ("text", "answer"), [("a = 3.\n#### 3", 3), ("#### 12", None), ("#### 7", None), ("####0.", 0), ("3", None)]
)
def test_the_answer_is_what_follows_the_mark(text: str, answer: int | None) -> None:
    assert answer_in(text) == answer


@pytest.mark.parametrize("objective", ["arm", "llada"])
def test_a_model_of_either_objective_answers_in_the_room_that_the_prompts_leave(objective: str) -> None:
    lm = replace(model(objective, 2048), tokenizer=byte_tokenizer(), mask_token_id=257, eos_token_id=256)
    (found,) = outcomes(lm, "igsm_4", {"problems": 3, "system": False}, shots=0, sampling={"length": 4})
    assert (found.n, found.value, found.metrics["unanswered,none"]["value"]) == (3, 0.0, 1.0)  # 4 bytes of noise
    longest = max(len(asked(question(p))) for p in islice(problems(0, steps=4, test=True), 3))
    (found,) = outcomes(replace(lm, context_length=longest + 20), "igsm_4", {"problems": 3, "system": False}, shots=0)
    assert found.sampling["length"] == 20
    refused = f"{longest} tokens .* trained on {longest}; give fewer --shots"  # cut, it would be another task
    with pytest.raises(UserError, match=refused):
        outcomes(replace(lm, context_length=longest), "igsm_4", {"problems": 3, "system": False}, shots=0)


def test_the_corpus_is_of_the_size_and_seed_asked_for() -> None:
    corpus = open_corpus("igsm:50@3")
    assert list(corpus.documents()) == [document(p) for p in islice(problems(3), 50)]
    assert corpus.identity != open_corpus("igsm:50@4").identity
    for wrong in ("igsm", "igsm:", "igsm:0", "igsm:5@x"):
        with pytest.raises(UserError, match="write igsm:COUNT"):
            open_corpus(wrong)


# --- reversal ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([vars(pair) for pair in PAIRS]))
    return str(path)


class Oracle:
    """Stands for ``generate``: knows the pairs forwards, and backwards the second one only."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.asked: list[str] = []
        self.lengths: list[int] = []

    def __call__(self, _: Any, prompts: Sequence[list[int]], **sampling: Any) -> SimpleNamespace:
        known = {p.first: p.second for p in PAIRS} | {PAIRS[1].second: PAIRS[1].first}
        texts, tokens = [], []
        for prompt in prompts:
            text = self.lm.decode([token for token in prompt if token != 1])
            half = next(known.get(h, "?") for p in PAIRS for h in (p.first, p.second) if h in text)
            if sampling.get("infill"):
                masks = [i for i, token in enumerate(prompt) if token == 1]
                fill = self.lm.encode((" " if masks[0] else "") + half) + [2] * len(masks)
                tokens.append([fill[masks.index(i)] if i in masks else token for i, token in enumerate(prompt)])
            else:
                self.lengths.append(sampling["length"])
            self.asked.append(text)
            texts.append(f" {half}. And more")
        return SimpleNamespace(text=texts, tokens=tokens)


ENGLISH = {"joiner": " is ", "end": "."}


@pytest.mark.parametrize("task", ["reversal", "reversal_infill"])
def test_an_oracle_that_knows_one_pair_backwards_is_counted(
    monkeypatch: pytest.MonkeyPatch, pairs_file: str, task: str
) -> None:
    lm = model()
    oracle = Oracle(lm)
    monkeypatch.setattr(harness, "generate", oracle)
    backward, forward = outcomes(lm, task, {"pairs": pairs_file, **ENGLISH})
    assert (forward.name, backward.name) == (f"{task}_forward", f"{task}_backward")
    assert (forward.value, backward.value, forward.n) == (1.0, pytest.approx(1 / 3), 3)
    assert backward.stderr == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    assert forward.metrics["characters,none"]["value"] == 1.0 > backward.metrics["characters,none"]["value"] > 0
    if task == "reversal":
        assert set(oracle.asked) == {f"{half} is" for pair in PAIRS for half in (pair.first, pair.second)}
        # As many tokens as the right answer has, whatever the user says.
        wanted = {len(lm.encode(f" {half}.")) for pair in PAIRS for half in (pair.first, pair.second)}
        assert set(oracle.lengths) == wanted
        assert forward.sampling["length"] == [min(wanted), max(wanted)]
    else:
        assert set(oracle.asked) >= {"Ada is.", " is the judge."}


def test_gaps_leave_what_the_tokenizer_puts_first_and_add_no_spaces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_mask = Tokenizer.from_str(sentence_piece().to_str())
    with_mask.add_special_tokens(["[MASK]"])
    mask = with_mask.token_to_id("[MASK]")
    lm = replace(model(), tokenizer=with_mask, text_prefix_ids=(5,), mask_token_id=mask)
    rows: list[list[int]] = []

    def filled(_: Any, prompts: list[list[int]], **__: Any) -> SimpleNamespace:
        rows.extend(prompts)
        return SimpleNamespace(text=None, tokens=prompts)

    monkeypatch.setattr(harness, "generate", filled)
    path = tmp_path / "pairs.json"
    path.write_text('[{"first": "the boats", "second": "home"}]')
    for direction in ("forward", "backward"):
        outcomes(lm, f"reversal_infill_{direction}", {"pairs": str(path), "joiner": " came ", "end": ""})
    the, boats, came, home = lm.encode("the boats came home")
    assert rows == [[5, the, boats, came, mask], [5, mask, mask, came, home]]


def test_a_chat_asks_the_papers_questions(monkeypatch: pytest.MonkeyPatch, pairs_file: str) -> None:
    lm = replace(model(context=128), chat_template=PLAIN_TEMPLATE)
    oracle = Oracle(lm)
    monkeypatch.setattr(harness, "generate", oracle)
    _, forward = outcomes(lm, "reversal", {"pairs": pairs_file}, chat=True, sampling={"length": 8})
    assert oracle.asked[3] == "user:\nAda的下一句是什么？直接输出句子即可。\n\nassistant:\n"
    assert oracle.asked[0] == "user:\nthe judge的上一句是什么？直接输出句子即可。\n\nassistant:\n"
    assert set(oracle.lengths) == {8} == {forward.sampling["length"]}
    with pytest.raises(UserError, match="leave --chat out"):
        reversal_documents("forward", infill=True, chat=True, pairs=pairs_file)


@pytest.mark.parametrize("objective", ["arm", "llada"])
def test_halves_are_those_that_generate_gives(objective: str, pairs_file: str) -> None:
    lm = model(objective)
    right = []
    for pair in PAIRS:
        (text,) = generate(lm, [lm.encode(f"{pair.first} is")], length=len(lm.encode(f" {pair.second}."))).text or ()
        letters = zip(text.partition(".")[0].strip(), pair.second, strict=False)
        right.append(sum(a == b for a, b in letters))
    (found,) = outcomes(lm, "reversal_forward", {"pairs": pairs_file, **ENGLISH}, sampling={"length": 3})
    assert found.metrics["characters,none"]["value"] == sum(right) / sum(len(pair.second) for pair in PAIRS)


def test_invented_facts_are_asked_for_in_their_own_words() -> None:
    (first, *_), documents = open_corpus("facts:3").documents(), reversal_documents("forward", pairs="facts:3")["test"]
    assert len(documents) == 3
    assert documents[0]["text"] + documents[0]["answer"] == first


def test_pairs_are_read_with_what_is_wrong_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
            read_halves(path)
    path.write_text(json.dumps([{"first": "a", "second": "b", "source": "c"}]))
    assert read_halves(path) == [Fact("a", "b")]
    assert capsys.readouterr().err == f"note: pairs '{path}': not read: 'source' (1 row)\n"
    path.write_text(json.dumps([{"first": "a", "second": "b"}]), encoding="utf-8-sig")
    assert read_halves(path) == [Fact("a", "b")]


# --- what cannot be asked ---------------------------------------------------------------------------------------------


def test_what_a_model_cannot_be_asked_is_refused(pairs_file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an arm, which sees nothing behind a gap"):
        outcomes(model("arm"), "reversal_infill_forward", {"pairs": pairs_file})
    with pytest.raises(UserError, match="no chat template"):
        outcomes(model(), "reversal_forward", {"pairs": pairs_file}, chat=True)
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"first": "a" * 5000, "second": "b"}]))
    with pytest.raises(UserError, match="5003 tokens leaves no room for an answer, as '' was trained on 64"):
        outcomes(model(), "reversal_forward", {"pairs": str(path)})
    with pytest.raises(UserError, match="5 shots wanted, and it has 4 documents"):
        outcomes(model(), "igsm_4", {}, shots=5)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["reversal"], "task reversal: which pairs? give --metadata pairs=FILE.json, or pairs=facts:COUNT[@SEED]"),
        (["reversal", "--metadata", "pairs=/nowhere.json"], "/nowhere.json"),
        (["reversal", "--metadata", "pairs=facts:0"], "write facts:COUNT"),
        (["igsm", "--metadata", "problems=0"], "--metadata problems=0: give a whole number of at least 1"),
        (["igsm", "--metadata", "system=no"], "--metadata system=no: give true or false"),
        (["igsm", "--metadata", "seed=3"], "--metadata seed: not known; choose from problems, problem_seed, system,"),
        (["igsm", "--metadata", "problems"], "--metadata 'problems': write KEY=VALUE"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "nowhere", "--quiet", "--tasks", *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "command"),
    [
        ("igsm", "llada evaluate CKPT --tasks igsm"),
        ("reversal", "llada evaluate CKPT --tasks reversal --metadata pairs=FILE.json"),
        ("ablate", "llada evaluate CKPT --suite ablate-length --tasks TASK"),
    ],
)
def test_a_command_of_earlier_versions_names_the_new_one(
    verb: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "checkpoint", "--any", "option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: '{verb}' is a part of evaluate now; type: {command};") and error.count("\n") == 1
