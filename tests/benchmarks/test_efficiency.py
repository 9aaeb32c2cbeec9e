"""The efficiency study on toy checkpoints: what is counted, what is judged, what memory follows, what is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import efficiency
import efficiency_memory
from efficiency_figure import efficiency_figure, family_styles
from efficiency_memory import measure_memory
from efficiency_quality import ended, judged, unigram_entropy
from efficiency_samplers import Sampler, agreement, study_samplers, time_samplers
from helpers.small_checkpoints import EOS, MASK, described, in_memory, tokenizer_folder, written
from llada_lightning.checkpoints.convert import convert
from llada_lightning.checkpoints.language_model import LanguageModel, load_model
from llada_lightning.compute.shapes import Shape
from llada_lightning.data.manifest import read_manifest
from llada_lightning.data.prepare import prepare
from llada_lightning.generation.sampler import generate
from llada_lightning.support.errors import UserError

TOY = ["--length", "8", "--steps", "4", "8", "--block-length", "4", "--batch", "2", "--prompts-count", "4"]
TOY += ["--prompt-length", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An arm and a llada with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    words = tokenizer_folder(folder / "words")
    return {objective: written(folder / objective, "llada", objective, words) for objective in ("llada", "arm")}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, LanguageModel]:
    return {objective: load_model(path, device="cpu") for objective, path in checkpoints.items()}


def command(checkpoints: dict[str, Path], *others: str) -> list[str]:
    return ["--llada", str(checkpoints["llada"]), "--arm", str(checkpoints["arm"]), *TOY, *others]


def peaks_at_once(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a process that measures, without the five seconds that it takes to start."""
    return [
        {**job, "measure": "resident", "baseline_bytes": 10, "peak_bytes": 20, "llada_steps": 4} for job in task["jobs"]
    ]


def test_a_study_of_a_prepared_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From checkpoints and a corpus to JSON, figure and report."""
    monkeypatch.setattr(efficiency_memory, "_in_a_process", peaks_at_once)
    (tmp_path / "corpus.txt").write_text(
        "\n\n".join(f"A text, the {i}th of {i * 7 % 13}, it says." for i in range(400))
    )
    data = str(tmp_path / "data")
    prepare(
        str(tmp_path / "corpus.txt"), data, vocab_size=300, document_separator="\n\n", val_fraction=0.2, progress=False
    )
    ids = read_manifest(data).tokenizer
    checkpoints: dict[str, Path] = {"llada": tmp_path / "llada", "arm": tmp_path / "arm"}
    for objective, folder in checkpoints.items():
        start = ids.eos_id if objective == "arm" else None
        special = {"eos_token_id": ids.eos_id, "mask_token_id": ids.mask_id, "start_token_id": start}
        description = replace(
            described(objective, vocab_size=ids.vocab_size), **special, end_token_ids=(), bos_token_id=None
        )
        convert(in_memory(description, Path(data)), folder, "llada")

    out = tmp_path / "out"
    memory = ["--memory-inputs", "16", "--memory-outputs", "32"]
    assert efficiency.main(command(checkpoints, "--data", data, "--out", str(out), *memory)) == 0

    result = json.loads((out / "efficiency.json").read_text())
    rows = {row["sampler"]: row for row in result["samplers"]}
    assert rows["llada, pure diffusion, 4 steps"]["forward_passes"] == 4
    assert rows["llada, blocks, dual cache, 8 steps"]["forward_passes"] == 8
    assert rows["arm, cache"]["forward_passes"] == 8
    assert rows["arm, cache"]["same_tokens"] == 1
    assert rows["arm, cache"]["same_tokens_as"] == "arm, no cache"
    assert rows["llada, blocks, prefix cache, 4 steps"]["same_tokens_as"] == "llada, blocks of 4, 4 steps"
    assert rows["llada, pure diffusion, 4 steps"]["same_tokens"] is None
    assert all(row["slowest_batch"] <= row["tokens_per_second"] <= row["fastest_batch"] for row in rows.values())
    assert all(0 < row["mean_length"] <= 8 and row["nats_per_token"] > 0 for row in rows.values())
    assert result["continuations"]["entropy"] > 0
    assert {row["sampler"] for row in result["memory"]} == {"llada", "arm, no cache", "arm, cache"}
    assert (out / "efficiency.png").stat().st_size > 10_000

    report = capsys.readouterr().out
    assert all(f"| {name} |" in report for name in rows)
    assert "it favours its own answers" in report  # the judge is the arm under study
    assert "| 16 | 32 |" in report


def test_texts_and_another_judge(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts from a file, no memory, JSON on stdout; nothing is known of what follows the prompts."""
    (tmp_path / "prompts.txt").write_text("one\n\ntwo two\nthree\nfour\nfive\n")
    judge = written(tmp_path / "judge", "llada", "arm", tokenizer_folder(tmp_path / "words"))
    others = ["--prompts", str(tmp_path / "prompts.txt"), "--judge", str(judge), "--memory-inputs", "--json"]
    assert efficiency.main(command(checkpoints, *others, "--out", str(tmp_path / "out"))) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out" / "efficiency.json").read_text())
    assert result["memory"] == [] and result["continuations"] is None
    assert result["models"]["judge"]["checkpoint"] == str(judge)
    assert "it favours its own" not in efficiency.report(result)


# --- samplers --------------------------------------------------------------------------------------------------------


def test_samplers_have_names_of_their_own_and_exact_ones_to_compare_with() -> None:
    samplers = study_samplers(16, [8, 4, 8], 4, 0.9, "low_confidence")
    names = [sampler.name for sampler in samplers]
    assert len(set(names)) == len(names) == 4 * 2 + 4  # 8 steps are given twice and taken once
    for sampler in samplers:
        cached = sampler.options.get("cache", "none") != "none"
        assert cached == (sampler.exact is not None)
        if cached:
            assert any((other.family, other.steps) == (sampler.exact, sampler.steps) for other in samplers)


def test_answers_are_whole_and_do_not_depend_on_the_batches(models: dict[str, LanguageModel]) -> None:
    """Every word ends an answer, and none stops a sampler."""
    eager = {objective: replace(lm, end_token_ids=tuple(range(272))) for objective, lm in models.items()}
    samplers = [Sampler("llada", "pure", 4), Sampler("arm", "arm", options={"cache": "kv"})]
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    settings: dict[str, Any] = {"length": 8, "temperature": 1.0, "seed": 3}
    found = time_samplers(eager, samplers, [prompts[:2], prompts[2:]], **settings)
    at_once = time_samplers(eager, samplers, [prompts], **settings)
    for name, timing in found.items():
        assert [len(answer) for answer in timing.answers] == [8] * 4
        assert timing.answers == at_once[name].answers
        assert len(timing.seconds) == 2
        assert timing.tokens_per_second == [2 * 8 / seconds for seconds in timing.seconds]
    assert [len(answer) for answer in generate(eager["arm"], prompts, length=8).tokens] == [1] * 4  # else they would


def test_agreement_counts_places() -> None:
    assert agreement([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75


# --- quality ---------------------------------------------------------------------------------------------------------


def test_quality_is_the_judges_likelihood_up_to_the_end(models: dict[str, LanguageModel]) -> None:
    """Nats by hand, of an answer with an end within, and of one without."""
    prompts, answers = [[5, 6], [7]], [[10, 11, EOS, 12], [13, 13, 13, 13]]
    quality = judged(models["arm"], models["llada"], prompts, answers)
    read = [[10, 11, EOS], [13, 13, 13, 13]]
    nats = -sum(log_prob(models["arm"], [EOS, *p], a) for p, a in zip(prompts, read, strict=True))
    assert quality.nats_per_token == pytest.approx(nats / 7, rel=1e-5)
    assert quality.mean_length == 3.5
    assert quality.entropy == pytest.approx((math.log(3) + 0) / 2)


def log_prob(arm: LanguageModel, given: list[int], answer: list[int]) -> float:
    logits_LV = arm.logits(torch.tensor([[*given, *answer]]))[0].double()
    logits_LV[:, MASK] = -math.inf
    log_p_LV = logits_LV.log_softmax(-1)
    return sum(float(log_p_LV[len(given) - 1 + i, token]) for i, token in enumerate(answer))


def test_a_judge_with_other_words_reads_the_text(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    """The special tokens have other ids: equal texts count, not equal ids."""
    words = tokenizer_folder(tmp_path / "words", special=("<pad>", "[EOS]", "[MASK]", "<bos>"))
    ids = {"eos_token_id": 257, "mask_token_id": 258, "start_token_id": 257, "end_token_ids": (), "bos_token_id": None}
    convert(in_memory(replace(described("arm"), **ids), words), tmp_path / "judge", "llada")
    judge = load_model(tmp_path / "judge", device="cpu")
    answers = [models["llada"].encode("some text"), [*models["llada"].encode("end"), EOS, 3]]
    quality = judged(judge, models["llada"], ["a prompt", "b"], answers)
    assert quality.mean_length == (9 + 3) / 2  # bytes; the end is no text
    texts = [judge.encode("some text"), judge.encode("end")]
    assert quality == judged(judge, judge, ["a prompt", "b"], texts)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.randoms())
def test_entropy_of_words(answer: list[int], random: Any) -> None:
    """Between repetition and all different; the order of the words does not count, nor how often all come again."""
    shuffled = random.sample(answer, len(answer))
    assert unigram_entropy(shuffled) == pytest.approx(unigram_entropy(answer))
    assert unigram_entropy(answer * 3) == pytest.approx(unigram_entropy(answer))
    assert 0 <= unigram_entropy(answer) <= math.log(len(set(answer))) + 1e-12
    assert unigram_entropy(list(range(len(answer)))) == pytest.approx(math.log(len(answer)))


def test_an_answer_ends_with_its_first_end() -> None:
    assert ended([4, 0, 5, 0], (0, 9)) == [4, 0]
    assert ended([4, 9, 0], (0, 9)) == [4, 9]
    assert ended([4, 5], (0,)) == [4, 5]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_grows_with_the_length_by_what_is_kept() -> None:
    """2048 more tokens cost a cache at least their keys and values; without one there are the activations alone."""
    shape = Shape(n_layers=16, d_model=64, n_heads=4, n_kv_heads=4, d_ff=96)
    rows = measure_memory(described("arm", shape), "float32", "cpu", [1024, 3072], [4])
    above = {(row["sampler"], row["input"]): row["peak_bytes"] - row["baseline_bytes"] for row in rows}
    kept = 2 * shape.n_layers * shape.d_model * 4 * (3072 - 1024)
    assert above["arm, cache", 3072] - above["arm, cache", 1024] > kept
    assert above["arm, no cache", 1024] < above["arm, no cache", 3072] < above["arm, cache", 3072] - 0.5 * kept
    assert all(row["measure"] == "resident" for row in rows)


def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(UserError, match=r"memory: measuring arm failed .*dtype"):
        measure_memory(described("arm"), "float7", "cpu", [4], [4])


# --- figure ----------------------------------------------------------------------------------------------------------


def test_the_figure_shows_every_sampler_apart() -> None:
    samplers = study_samplers(16, [4, 8], 4, 0.9, "low_confidence")
    value = {
        "tokens_per_second": 9.0,
        "nats_per_token": 3.0,
        "nats_stderr": 0.1,
        "entropy": 2.0,
        "entropy_stderr": None,
    }
    rows = [{"family": s.family, "steps": s.steps, **value} for s in samplers]
    styles = family_styles(rows)
    assert len({json.dumps(style, sort_keys=True) for style in styles.values()}) == len(styles) == 8
    settings = {"batch": 1, "length": 16}
    result = {"samplers": rows, "memory": [], "continuations": None, "settings": settings, "hardware": {"device": "x"}}
    nats, _ = efficiency_figure(result).axes
    assert {line.get_label(): len(line.get_xdata()) for line in nats.lines} == {  # type: ignore[arg-type]
        family: 1 if "threshold" in family or "arm" in family else 2 for family in styles
    }


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "give either --data .* or --prompts"),
        (["--prompts", "P", "--prompts-count", "5"], "5 is no multiple of batch 2; give 4"),
        (["--prompts", "P", "--block-length", "3"], "3 does not divide length 8"),
        (["--prompts", "P", "--steps", "3"], "3 do not divide into 2 blocks; give multiples of 2"),
        (["--prompts", "P"], "has 2 prompts; set --prompts-count to no more"),
        (["--prompts", "missing.txt"], "'missing.txt' cannot be read"),
        (["--prompts", "P", "--arm", "L"], "is a checkpoint of llada; give one of arm"),
        (["--prompts", "P", "--memory-outputs", "0"], "one is below 1 token"),
    ],
)
def test_mistakes_are_one_line(
    others: list[str],
    message: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    names = {"P": str(tmp_path / "prompts.txt"), "L": str(checkpoints["llada"])}
    argv = command(checkpoints, "--out", str(tmp_path / "out"), "--memory-inputs")
    assert efficiency.main([*argv, *(names.get(word, word) for word in others)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("efficiency: ")]
    assert len(error) == 1
    assert re.search(f"error: .*{message}", error[0])
    assert not (tmp_path / "out").exists()
