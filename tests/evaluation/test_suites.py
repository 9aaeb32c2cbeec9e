"""The paper's Tables 6 to 10 as suites: their rows, what each row measures, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.local_tasks import answer_task, choice_task

pytest.importorskip("lm_eval")

import datasets

from helpers.small_checkpoints import tokenizer_folder, written
from llada_lightning.checkpoints.language_model import load_model
from llada_lightning.commands.main import main
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.suites import ABLATIONS, Benchmark, Outcome, best_rows, outcome_table
from llada_lightning.generation.sampler import generate
from llada_lightning.support.errors import UserError

QUESTIONS = [f"after {n} comes" for n in range(6)]
TASK = Benchmark("task", "task")


def rows(name: str, values: tuple[float, ...] = ()) -> list[Benchmark]:
    return list(ABLATIONS[name].suite([TASK], values).benchmarks)


def test_the_rows_are_those_of_the_paper() -> None:
    assert [(each.table, name) for name, each in ABLATIONS.items()] == [
        (6, "ablate-guidance"), (7, "ablate-strategies"), (8, "ablate-strategies-instruct"), (9, "ablate-remasking"),
        (10, "ablate-length"),
    ]  # fmt: skip
    assert [len(rows(name)) for name in ABLATIONS] == [5, 10, 4, 2, 3]
    instruct = rows("ablate-strategies-instruct")
    assert [row.sampling.get("zero_eos_confidence", False) for row in instruct] == [False, False, False, True]
    assert {row.sampling["block_length"] for row in instruct} == {None, 32}
    assert [row.row for row in rows("ablate-guidance")] == [
        "w/o CFG", "CFG, w = 0.5", "CFG, w = 1", "CFG, w = 1.5", "CFG, w = 2",
    ]  # fmt: skip


def test_rows_differ_in_what_is_varied_and_in_nothing_else() -> None:
    lengths = rows("ablate-length", (8.0, 16.0))
    assert [(row.sampling["length"], row.sampling["steps"]) for row in lengths] == [(8, 8), (16, 16)]  # a token a step
    blocks = rows("ablate-strategies", (4.0,))
    assert [(row.sampling["strategy"], row.sampling["block_length"]) for row in blocks] == [
        ("autoregressive", None), ("block_diffusion", 4), ("diffusion", 4), ("diffusion", None),
    ]  # fmt: skip
    both = ABLATIONS["ablate-remasking"].suite([TASK, Benchmark("other", "other")]).benchmarks
    assert [(each.row, each.name) for each in both[:2]] == [("random remasking", "task"), ("random remasking", "other")]


def test_the_best_scale_is_taken_for_each_task_and_named() -> None:
    scores = {"w/o CFG": (0.9, 0.1), "CFG, w = 0.5": (0.3, 0.6), "CFG, w = 1": (0.5, 0.2), "CFG, w = 1.5": (0.4, 0.6)}
    groups = {row.row: row.group for row in rows("ablate-guidance") if row.row and row.group}
    outcomes = [
        Outcome(task, task, "acc,none", value, 0.01, 8, 0, {}, row=row)
        for row, values in scores.items()
        for task, value in zip("ab", values, strict=True)
    ]
    assert [(each.name, each.row, each.value, each.best_of) for each in best_rows(outcomes, groups)] == [
        ("a", "w/ CFG (the best)", 0.5, "CFG, w = 1"), ("b", "w/ CFG (the best)", 0.6, "CFG, w = 0.5"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ablate-remasking", (4.0,), "--values: Table 9 has none to replace"),
        ("ablate-strategies", (0.0,), "--values 0: give whole numbers of at least 1"),
        ("ablate-length", (4.5,), "--values 4.5: give whole numbers of at least 1"),
        ("ablate-guidance", (-1.0,), "--values -1: give scales above 0"),
    ],
)
def test_values_that_cannot_be_are_refused(name: str, values: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows(name, values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("ablate")
    tokenizer = tokenizer_folder(root / "tokenizer")
    for objective in ("arm", "llada"):
        written(root / objective, "llada", objective, tokenizer)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield root


def evaluate(folder: Path, objective: str, *words: str) -> int:
    return main(["evaluate", str(folder / objective), "--include-path", str(folder / "tasks"), "--quiet", *words])


def test_each_row_is_a_direct_computation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = load_model(folder / "llada")
    prompts = [lm.encode_prompt(question) for question in QUESTIONS]
    answers = generate(lm, prompts, length=8, strategy="block_diffusion", block_length=4).text
    assert answers is not None
    documents = [{"question": q, "answer": a.strip()} for q, a in zip(QUESTIONS, answers, strict=True)]
    answer_task(folder / "tasks", documents)
    words = ("--suite", "ablate-strategies", "--values", "4", "--tasks", "local_answer", "--json")
    assert evaluate(folder, "llada", *words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["suite"] == "ablate-strategies"
    found = {result["row"]: result for result in record["results"]}
    assert list(found) == [
        "autoregressive", "block diffusion, L' = 4", "block diffusion LLaDA, L' = 4", "pure diffusion",
    ]  # fmt: skip
    for row, settings in {
        "autoregressive": {"strategy": "autoregressive"},
        "block diffusion, L' = 4": {"strategy": "block_diffusion", "block_length": 4},
        "pure diffusion": {"strategy": "diffusion"},
    }.items():
        text = generate(lm, prompts, length=8, **settings).text  # type: ignore[arg-type]
        assert text is not None
        right = [a.strip() == d["answer"] for a, d in zip(text, documents, strict=True)]
        assert found[row]["value"] == pytest.approx(sum(right) / len(right)), row
        assert found[row]["sampling"] == {"length": 8, "steps": 8, **settings}  # told, though the task chose the length
    assert found["block diffusion, L' = 4"]["value"] == 1


def test_guidance_reaches_the_likelihoods(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    documents = choice_task(folder / "tasks")
    out = tmp_path / "table.json"
    words = ("--suite", "ablate-guidance", "--tasks", "local_choice", "--monte-carlo", "4", "--out", str(out))
    assert evaluate(folder, "llada", *words) == 0
    table = capsys.readouterr().out
    assert "Table 6: classifier-free guidance, % ± s.e." in table and "so it is optimistic" in table
    found = {result["row"]: result for result in json.loads(out.read_text())["results"]}
    lm = load_model(folder / "llada")
    for row, scale in {"w/o CFG": 0.0, "CFG, w = 2": 2.0}.items():
        right = 0
        for document in documents:
            prompt = lm.encode_prompt(f"{document['question']}\nAnswer:")
            pairs = [(prompt, lm.encode(f" {choice}")) for choice in document["choices"]]
            values = [score.mean for score in log_likelihood(lm, pairs, 4, cfg_scale=scale)]
            right += values.index(max(values)) == document["answer"]
        assert found[row]["value"] == pytest.approx(right / len(documents)), row
        assert found[row]["sampling"] == {"cfg_scale": scale}
        shown = f"{100 * found[row]['value']:.1f} ± {100 * found[row]['stderr']:.1f}"
        assert any(line.split("  ")[0].strip() == row and shown in line for line in table.splitlines())
    assert found["w/ CFG (the best)"]["best_of"] in found


@pytest.mark.parametrize(
    ("objective", "words", "message"),
    [
        ("llada", ("--suite", "ablate-heat", "--tasks", "a"), "--suite 'ablate-heat' is not known; choose from"),
        ("llada", ("--suite", "ablate-length"), "--suite ablate-length: which tasks?"),
        ("llada", ("--suite", "paper-base", "--values", "4"), "--values is of the suites ablate-guidance"),
        ("llada", ("--suite", "ablate-length", "--tasks", "local_choice"), "of likelihoods, and Table 10 varies"),
        (
            "llada",
            ("--suite", "ablate-length", "--length", "4", "--tasks", "a"),
            "--length is what Table 10 varies; leave it out",
        ),
        ("arm", ("--suite", "ablate-guidance", "--tasks", "local_choice"), "give a llada checkpoint"),
    ],
)
def test_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], objective: str, words: tuple[str, ...], message: str
) -> None:
    choice_task(folder / "tasks")
    assert evaluate(folder, objective, *words) == 2
    assert message in capsys.readouterr().err


def test_answers_that_are_all_alike_tell_no_error_and_a_metric_without_a_filter_has_its_plain_name() -> None:
    scores = {"all": (1.0, 0.0), "some": (0.5, 0.2)}
    results = [Outcome(name, name, "acc,none", *score, 4, 0, {}) for name, score in scores.items()]
    metrics, values = outcome_table(results).columns[1], outcome_table(results).columns[4]
    assert list(metrics.cells) == ["acc", "acc"]
    assert list(values.cells) == ["100.00 ± n/a %", "50.00 ± 20.00 %"]
