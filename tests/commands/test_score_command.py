"""`llada score` from its arguments to its output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from helpers.small_checkpoints import tokenizer_folder
from helpers.small_checkpoints import written as stored
from helpers.small_models import ids, random_model
from helpers.small_tokenizers import letters, written
from llada_lightning.checkpoints.language_model import load_model
from llada_lightning.commands.main import main
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.policy import Policy
from llada_lightning.evaluation.scoring import _with_error, rolling_log_likelihood

LLADA, ARM = (replace(random_model(objective), tokenizer=letters()) for objective in ("llada", "arm"))  # type: ignore[arg-type]
PAIRS = [{"prompt": "abc", "continuation": "d"}, {"prompt": "ab ", "continuation": "efghijklm"}]
CHOICES = [
    {"prompt": [n, n + 1], "choices": [ids(length, 10 * n + length) for length in (1, 5, 9)], "answer": n % 3}
    for n in range(6)
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `llada score CKPT …`; the checkpoint is `llada`, `arm`, or one without a tokenizer, `bare`."""

    def load_model(path: str, tokenizer: Any = None, device: Any = None, dtype: Any = None) -> Any:
        return {"llada": LLADA, "arm": ARM, "bare": random_model()}[path]

    module = ModuleType("llada_lightning.checkpoints.language_model")
    module.load_model = load_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("COLUMNS", "160")

    def score(*arguments: str) -> tuple[int, str, str]:
        code = main(["score", *map(str, arguments)])
        return code, *capsys.readouterr()  # type: ignore[return-value]

    return score


@pytest.mark.parametrize(("name", "lm"), [("llada", LLADA), ("arm", ARM)])
def test_pairs_as_one_json_object_and_as_lines(run: Run, tmp_path: Path, name: str, lm: Any) -> None:
    out = tmp_path / "out.jsonl"
    code, stdout, stderr = run(name, "--pairs", written(tmp_path, *PAIRS), "--json", "--out", out, "--samples", "16")
    assert code == 0
    assert stderr == ("note: --samples: without effect, the value of arm is exact\n" if name == "arm" else "")
    result = json.loads(stdout)
    expected = log_likelihood(lm, [([0, 1, 2], [3]), ([0, 1], [26, *range(4, 13)])], samples=16)
    assert [row["mean"] for row in result["results"]] == pytest.approx([score.mean for score in expected])
    nats = -sum(score.mean for score in expected)
    assert result["nats_per_token"] == pytest.approx(nats / 11)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / 11)  # the moved space is scored, so it counts
    assert result["kind"] == ("exact" if name == "arm" else "bound")
    assert (result["requests"], result["tokens"], result["objective"]) == (2, 11, name)
    assert [json.loads(line) for line in out.read_text().splitlines()] == result["results"]


def test_where_white_space_is_written_does_not_change_bits_per_byte(run: Run, tmp_path: Path) -> None:
    said = []
    for prompt, continuation in (("the   ", "cat"), ("the", "   cat")):
        path = written(tmp_path, {"prompt": prompt, "continuation": continuation})
        said.append(json.loads(run("llada", "--pairs", path, "--json")[1])["bits_per_byte"])
    assert said[0] == said[1] > 0


@pytest.mark.parametrize("objective", ["llada", "arm"])
def test_a_checkpoint_from_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: Any) -> None:
    folder = stored(tmp_path / "model", "llada", objective, tokenizer_folder(tmp_path / "words"))
    path = written(tmp_path, *PAIRS)
    assert main(["score", str(folder), "--pairs", str(path), "--json", "--quiet", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    lm = load_model(folder, device="cpu")
    texts = [("abc", "d"), ("ab", " efghijklm")]
    expected = log_likelihood(lm, [(lm.encode(prompt), lm.encode(continuation)) for prompt, continuation in texts])
    assert [row["mean"] for row in result["results"]] == pytest.approx([score.mean for score in expected])
    assert result["objective"] == objective and result["results"][1]["mean"] < 0


@pytest.mark.parametrize("objective", ["llada", "arm"])
def test_an_empty_choice_does_not_win(run: Run, tmp_path: Path, objective: str) -> None:
    path = written(tmp_path, {"prompt": "a", "choices": ["b", ""], "answer": 0})
    code, stdout, stderr = run(objective, "--pairs", path)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "pairs.jsonl:1, choice 1: the continuation is empty" in stderr


def test_pairs_as_a_table(run: Run, tmp_path: Path) -> None:
    code, stdout, _ = run("llada", "--pairs", written(tmp_path, *PAIRS))
    assert code == 0
    assert "one pass" in stdout and "monte carlo" in stdout and "±" in stdout and "nats/token (bound)" in stdout


def test_choices_give_an_accuracy_with_its_error(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, *CHOICES)
    _, stdout, _ = run("llada", "--pairs", path, "--json", "--normalisation", "token", "--samples", "64")
    result = json.loads(stdout)
    hits = [row["best"] == n % 3 for n, row in enumerate(result["results"])]
    assert result["accuracy"] == pytest.approx(sum(hits) / 6)
    share = result["accuracy"]
    assert result["accuracy_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 5))
    for row in result["results"]:
        per_token = [choice["mean"] / choice["tokens"] for choice in row["choices"]]
        assert row["values"] == pytest.approx(per_token)
        assert row["best"] == per_token.index(max(per_token))
    assert {choice["samples"] for choice in result["results"][0]["choices"]} == {1, 31, 64}
    assert "settled" not in result and "settled" not in result["results"][0]
    table = run("llada", "--pairs", path, "--normalisation", "token", "--samples", "64")[1]
    assert "settled" not in table
    for value, choice in zip(result["results"][0]["values"], result["results"][0]["choices"], strict=True):
        shown = [_with_error(value, choice["stderr"] / choice["tokens"]), choice["kind"], str(choice["samples"])]
        assert any([cell.strip() for cell in line.split("│")[4:7]] == shown for line in table.splitlines())


def test_choices_until_they_are_settled(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, *CHOICES)
    _, stdout, _ = run("llada", "--pairs", path, "--json", "--confidence", "0.95")
    result = json.loads(stdout)
    assert result["settled"] == sum(row["settled"] for row in result["results"]) >= 4
    assert result["results"][0]["choices"][0]["method"] == "one pass"
    _, table, _ = run("llada", "--pairs", path, "--confidence", "0.95")
    assert "settled at 0.95" in table and "accuracy" in table
    _, stdout, _ = run("arm", "--pairs", path, "--json", "--confidence", "0.95")
    assert json.loads(stdout)["settled"] == 6


def lowering() -> Tokenizer:
    tokenizer = letters()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize("text", [True, False])
def test_bits_per_byte_are_left_out_where_the_ids_do_not_give_the_text_back(
    run: Run, tmp_path: Path, text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ARM", replace(ARM, tokenizer=lowering()))
    path = written(tmp_path, {"text": "Abcd"} if text else {"prompt": "ab", "continuation": "Defg"})
    arguments = ("--text" if text else "--pairs", path)
    code, stdout, stderr = run("arm", *arguments, "--json")
    assert code == 0
    result = json.loads(stdout)
    assert result["bits_per_byte"] is None
    assert result["lost_share"] == 0.25
    assert result["nats_per_token"] > 0
    assert stderr == (
        "note: 25 % of the text's bytes do not come back from its tokens; bits per byte are left out, as they would be "
        "too low\n"
    )
    code, stdout, _ = run("arm", *arguments)
    assert "nats/token" in stdout
    assert "bits/byte" not in stdout


def test_text_gives_bits_per_byte(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "abc def"}\n{"text": "ghi"}\n')
    options = ("--text", tmp_path / "text.jsonl", "--window", "4", "--stride", "2")
    _, stdout, _ = run("arm", *options, "--json")
    result = json.loads(stdout)
    texts = [LLADA.encode("abc def"), LLADA.encode("ghi")]
    expected = rolling_log_likelihood(ARM, texts, 4, 2, text_bytes=[7, 3])
    assert result["nats_per_token"] == pytest.approx(expected.nats_per_token)
    assert result["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    assert (result["kind"], result["window"], result["context"], result["documents"]) == ("exact", 4, 2, 2)
    _, said, _ = run("llada", *options)
    assert (
        "perplexity" in said
        and "bound" in said
        and "windows of at most 4 tokens, each with 2" in said.replace("\n", " ")
    )


def test_a_folder_of_texts_is_its_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("abc def")
    (tmp_path / "texts" / "more" / "b.jsonl").write_text('{"text": "ghi"}\n')
    result = json.loads(run("arm", "--text", tmp_path / "texts", "--json")[1])
    expected = rolling_log_likelihood(ARM, [LLADA.encode("abc def"), LLADA.encode("ghi")])
    assert (result["documents"], result["bytes"]) == (2, 10)
    assert result["nats_per_token"] == pytest.approx(expected.nats_per_token)


def test_one_text_shows_the_error_that_it_has(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("abc def ghijklm")
    path = tmp_path / "one.txt"
    _, said, _ = run("llada", "--text", path, "--samples", "32")
    result = json.loads(run("llada", "--text", path, "--samples", "32", "--json")[1])
    error = result["monte_carlo_stderr"]
    assert error > 0 and result["stderr"] is None
    assert f"{_with_error(result['nats_per_token'], error)} nats/token (bound)" in said
    perplexity = result["perplexity"]
    assert f"perplexity {_with_error(perplexity, perplexity * error)} (Monte Carlo only)" in said
    assert f"{_with_error(result['bits_per_byte'], error / math.log(2))} bits/byte" in said  # a byte a token
    assert "1 document, 15 tokens, 1 window of at most 48 tokens" in said
    _, said, _ = run("arm", "--text", path)
    assert "±" not in said and "one document has no standard error" in said


def test_one_request_shows_the_error_that_it_has(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, PAIRS[1])
    result = json.loads(run("llada", "--pairs", path, "--samples", "32", "--json")[1])
    error = result["monte_carlo_stderr"]
    assert error > 0 and result["stderr"] is None
    said = " ".join(run("llada", "--pairs", path, "--samples", "32")[1].split())
    assert f"{_with_error(result['nats_per_token'], error)} nats/token (bound), " in said
    assert (
        f"{_with_error(result['bits_per_byte'], error / math.log(2))} bits/byte (Monte Carlo only) over 1 req" in said
    )
    assert said.endswith("one request has no standard error")
    said = run("llada", "--pairs", path, "--samples", "1")[1]
    assert said.count("± ?") == 3  # the row, nats and bits
    said = run("arm", "--pairs", path)[1]
    assert "±" not in said and "Monte Carlo" not in said


@pytest.mark.parametrize(
    ("value", "stderr", "said"),
    [
        (5.6262, 0.49, "5.63 ± 0.49"),
        (-43.1639, 0.00099, "-43.16390 ± 0.00099"),
        (1234.5, 56.7, "1234 ± 57"),
        (2.0, 0.0, "2.0000"),
        (2.0, math.nan, "2.0000 ± ?"),
        (math.inf, math.inf, "inf ± ?"),
        (1.0, 3e-17, "1.000000000 ± 0.000000000"),
    ],
)
def test_a_value_ends_where_its_error_does(value: float, stderr: float, said: str) -> None:
    assert _with_error(value, stderr) == said


def test_the_perplexity_of_texts_has_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "abc def"}\n{"text": "ghi"}\n')
    result = json.loads(run("arm", "--text", tmp_path / "text.jsonl", "--json")[1])
    _, said, _ = run("arm", "--text", tmp_path / "text.jsonl")
    assert f"perplexity {_with_error(result['perplexity'], result['perplexity'] * result['stderr'])}\n" in said
    assert "2 documents, 10 tokens, 2 windows of at most 48 tokens\n" in said  # nothing of Monte Carlo: an arm


def test_long_prompts_are_cut_and_counted(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a" * 60, "continuation": "b"})
    _, stdout, _ = run("llada", "--pairs", path, "--truncate", "left", "--json")
    result = json.loads(stdout)
    assert (result["truncated"], result["results"][0]["truncated"]) == (1, 13)
    path = written(tmp_path, {"prompt": "ab" * 30, "choices": ["c", "defgh"]})
    for more in ([], ["--confidence", "0.9"]):
        result = json.loads(run("llada", "--pairs", path, "--truncate", "left", "--json", *more)[1])
        assert result["truncated"] == 1
        assert [choice["truncated"] for choice in result["results"][0]["choices"]] == [17, 17]


PAIR = {"prompt": [1], "continuation": [2]}
CHOICE = {"prompt": [1], "choices": [[2], [3]]}


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([PAIR], ["llada", "--samples", "0"], "samples is 0"),
        ([PAIR], ["llada", "--target-stderr", "0"], "target_stderr is 0.0"),
        ([PAIR], ["llada", "--target-stderr", "nan"], "nan given"),
        ([CHOICE], ["llada", "--confidence", "1"], "confidence is 1.0"),
        ([CHOICE], ["llada", "--confidence", "0.9", "--samples", "15"], "at least 16"),
        ([CHOICE], ["llada", "--confidence", "0.9", "--target-stderr", "1"], "give one of them"),
        ([PAIR], ["llada", "--confidence", "0.9"], "has continuations"),
        ([PAIR], ["llada", "--cfg-scale", "-1"], "cfg_scale is -1.0"),
        ([PAIR], ["arm", "--cfg-scale", "1"], "leave it at 0"),
        ([PAIR], ["llada", "--max-samples", "2"], "max_samples is 2"),
        ([PAIR], ["llada", "--max-samples", "256"], "does nothing without --target-stderr or --confidence"),
        ([PAIR], ["llada", "--text", "also.txt"], "both given"),
        ([{"prompt": "a", "continuation": "b"}], ["bare"], "has no tokenizer"),
        ([CHOICE], ["bare", "--normalisation", "byte"], "needs texts or a tokenizer"),
        ([{"prompt": [1] * 48, "continuation": [2]}], ["llada"], "pairs.jsonl:1: a prompt of 48"),
        (["nonsense"], ["llada"], "pairs.jsonl:1 is not JSON"),
        ([], ["llada"], "holds no line"),
        ([PAIR], ["llada", "--out", "/dev/null/out.jsonl"], "no folder /dev/null"),
        ([PAIR], ["llada", "--out", "/dev/null"], "'/dev/null' is no regular file"),
        ([PAIR], ["llada", "--out", "/dev"], "'/dev' is no regular file"),
        ([PAIR], ["llada", "--window", "4"], "--window does nothing with --pairs"),
        ([PAIR], ["llada", "--stride", "4"], "--stride does nothing with --pairs"),
        ([PAIR], ["llada", "--text-field", "text"], "--text-field does nothing with --pairs"),
        ([PAIR], ["llada", "--normalisation", "none"], "--normalisation is of choices"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    run: Run, tmp_path: Path, lines: list[Any], arguments: list[str], message: str
) -> None:
    code, stdout, stderr = run(*arguments, "--pairs", written(tmp_path, *lines))
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr


def test_mistakes_of_the_text_and_of_no_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for arguments, message in (
        (["--text", tmp_path / "empty.txt"], "no text"),
        (["--text", tmp_path / "none.txt"], "no such file or folder"),
        (["--pairs", tmp_path / "none.jsonl"], "no such file"),
        (["--pairs", tmp_path], "is a folder"),
        (["--text", tmp_path, "--out", tmp_path / "empty.txt"], "is a file that is scored"),
        ([], "neither given"),
        (["--text", tmp_path / "empty.txt", "--confidence", "0.9"], "is of choices"),
        (["--text", tmp_path / "empty.txt", "--truncate", "left"], "--truncate does nothing with --text"),
        (["--text", tmp_path / "empty.txt", "--normalisation", "byte"], "--normalisation does nothing with --text"),
    ):
        code, _, stderr = run("llada", *arguments)
        assert code == 2 and message in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--pairs", "--text", "--out"])
def test_a_path_that_no_file_can_have_is_one_line(run: Run, tmp_path: Path, option: str) -> None:
    path = written(tmp_path, PAIR)
    for name in ("a" * 300, "a\0b"):
        arguments = [option, name] if option != "--out" else ["--pairs", path, "--out", name]
        code, stdout, stderr = run("llada", *arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1) and stderr.startswith("error: ")


def test_where_results_cannot_go_is_told_before_anything_is_scored(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, PAIR)
    before = path.read_text()
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    for out, message in (
        (path, "is a file that is scored"),
        (link, "is a file that is scored"),
        (tmp_path, "is no regular file"),
        (path / "out.jsonl", "there is no folder"),
        (tmp_path / "none" / "out.jsonl", "there is no folder"),
    ):
        code, _, stderr = run("no such model", "--pairs", path, "--out", out)  # a KeyError, if it were loaded
        assert code == 2 and message in stderr and stderr.count("\n") == 1
    assert path.read_text() == before
    monkeypatch.setattr("os.access", lambda *_: False)
    code, _, stderr = run("no such model", "--pairs", path, "--out", tmp_path / "out.jsonl")
    assert code == 2 and "cannot be written into" in stderr and not (tmp_path / "out.jsonl").exists()


# --- by a decoding policy ---------------------------------------------------------------------------------------------


def test_a_policy_gives_exact_values(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, *PAIRS)
    how = ("--policy", "confidence", "--tokens-per-step", "2")
    code, stdout, stderr = run("llada", "--pairs", path, *how, "--json")
    assert (code, stderr) == (0, "")
    found = json.loads(stdout)
    assert found["kind"] == "exact (policy confidence@2)" and found["monte_carlo_stderr"] == 0
    requests = [(LLADA.encode("abc"), LLADA.encode("d")), (LLADA.encode("ab"), LLADA.encode(" efghijklm"))]
    scores = log_likelihood(LLADA, requests, policy=Policy("confidence", 2))
    assert [row["mean"] for row in found["results"]] == [score.mean for score in scores]
    assert {row["policy"] for row in found["results"]} == {"confidence@2"}
    code, stdout, _ = run("llada", "--pairs", path, *how)
    assert code == 0 and "exact (policy confidence@2)" in stdout
    code, stdout, stderr = run("llada", "--pairs", path, *how, "--samples", "8", "--target-stderr", "0.1")
    assert code == 0
    assert stderr == (
        "note: --samples, --target-stderr: without effect, the value of a policy (confidence@2) is exact\n"
    )


def test_choices_and_texts_by_a_policy(run: Run, tmp_path: Path) -> None:
    code, stdout, _ = run("llada", "--pairs", written(tmp_path, *CHOICES), "--policy", "margin", "--json")
    assert code == 0
    choices = json.loads(stdout)["results"][0]["choices"]
    asked = [(CHOICES[0]["prompt"], choice) for choice in CHOICES[0]["choices"]]
    expected = log_likelihood(LLADA, asked, policy=Policy("margin"))
    assert [choice["mean"] for choice in choices] == pytest.approx([score.mean for score in expected], abs=1e-4)
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijklmnop" * 5)
    code, stdout, _ = run("llada", "--text", text, "--policy", "left_to_right", "--tokens-per-step", "4")
    assert code == 0 and "nats/token (exact (policy left_to_right@4))" in stdout


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("llada", ("--policy", "confidnce"), "policy: 'confidnce' is not known; the nearest is 'confidence'"),
        ("llada", ("--policy", "margin", "--tokens-per-step", "0"), "policy margin: 0 tokens a step given"),
        ("llada", ("--policy", "margin", "--tokens-per-step", "99"), "policy margin: 99 tokens a step given, and the"),
        ("llada", ("--tokens-per-step", "2"), "score: --tokens-per-step does nothing without --policy"),
        ("arm", ("--policy", "margin"), "policy margin@1: arm has no [MASK]"),
    ],
)
def test_a_policy_that_cannot_be_is_one_line(
    run: Run, tmp_path: Path, name: str, options: tuple[str, ...], words: str
) -> None:
    code, _, stderr = run(name, "--pairs", written(tmp_path, *PAIRS), *options)
    [line] = stderr.splitlines()
    assert code == 2 and line.startswith(f"error: {words}"), line


def test_sampling_on_by_confidence_and_a_policy_exclude_each_other(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, *CHOICES)
    code, _, stderr = run("llada", "--pairs", path, "--policy", "margin", "--confidence", "0.9")
    assert code == 2 and "--confidence samples on, and the value of a --policy is exact" in stderr
