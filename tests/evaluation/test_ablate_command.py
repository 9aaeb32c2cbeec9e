"""`llada ablate` on local tasks and a toy checkpoint."""

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
from llada_lightning.generation.sampling import generate

QUESTIONS = [f"after {n} comes" for n in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("ablate")
    tokenizer = tokenizer_folder(root / "tokenizer")
    for objective in ("arm", "llada"):
        written(root / objective, "llada", objective, tokenizer)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield root


def ablate(folder: Path, objective: str, *words: str) -> int:
    return main(["ablate", str(folder / objective), "--include-path", str(folder / "tasks"), "--quiet", *words])


def test_each_row_is_a_direct_computation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = load_model(folder / "llada")
    prompts = [lm.encode_prompt(question) for question in QUESTIONS]
    answers = generate(lm, prompts, length=8, strategy="block_diffusion", block_length=4).text
    assert answers is not None
    documents = [{"question": q, "answer": a.strip()} for q, a in zip(QUESTIONS, answers, strict=True)]
    answer_task(folder / "tasks", documents)
    words = ("--vary", "strategies", "--blocks", "4", "--tasks", "local_answer", "--json")
    assert ablate(folder, "llada", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["table"] == 7
    assert list(found["rows"]) == [
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
        assert found["rows"][row]["local_answer"]["value"] == pytest.approx(sum(right) / len(right)), row
    assert found["rows"]["block diffusion, L' = 4"]["local_answer"]["value"] == 1


def test_guidance_reaches_the_likelihoods(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    documents = choice_task(folder / "tasks")
    out = tmp_path / "table.json"
    words = ("--vary", "cfg", "--tasks", "local_choice", "--monte-carlo", "4", "--out", str(out))
    assert ablate(folder, "llada", *words) == 0
    assert "Table 6: classifier-free guidance" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    lm = load_model(folder / "llada")
    for row, scale in {"w/o CFG": 0.0, "CFG, w = 2": 2.0}.items():
        right = 0
        for document in documents:
            prompt = lm.encode_prompt(f"{document['question']}\nAnswer:")
            pairs = [(prompt, lm.encode(f" {choice}")) for choice in document["choices"]]
            values = [score.mean for score in log_likelihood(lm, pairs, 4, cfg_scale=scale)]
            right += values.index(max(values)) == document["answer"]
        assert rows[row]["local_choice"]["value"] == pytest.approx(right / len(documents)), row
    assert rows["w/ CFG (the best)"]["local_choice"]["of"] in rows


@pytest.mark.parametrize(
    ("objective", "words", "message"),
    [
        ("llada", ("--vary", "heat", "--tasks", "local_choice"), "no ablation 'heat'; there are cfg"),
        (
            "llada",
            ("--vary", "length", "--tasks", "local_choice"),
            "of likelihoods, and Table 10 varies",
        ),
        ("llada", ("--vary", "length", "--length", "4", "--tasks", "a"), "--length is what Table 10 varies"),
        ("arm", ("--vary", "cfg", "--tasks", "local_choice"), "give a llada checkpoint"),
    ],
)
def test_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], objective: str, words: tuple[str, ...], message: str
) -> None:
    choice_task(folder / "tasks")
    assert ablate(folder, objective, *words) == 2
    assert message in capsys.readouterr().err
