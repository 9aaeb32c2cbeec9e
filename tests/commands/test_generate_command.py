"""``llada generate``, called as the command calls it, on small models."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from helpers.speaking_models import speaking_model
from llada_lightning.checkpoints import LanguageModel
from llada_lightning.commands import shared as options
from llada_lightning.commands.generate import generate_parser
from llada_lightning.commands.main import main
from llada_lightning.commands.shared import given_settings
from llada_lightning.generation import Sampling, generate
from llada_lightning.support.printing import warn_once

Captured = pytest.CaptureFixture[str]
FEW = ["--length", "8", "--steps", "4"]


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """What stands for the checkpoint `small` (`arm` gives an arm of the same make)."""
    made = {"small": speaking_model(), "arm": speaking_model("arm")}
    monkeypatch.setattr(options, "load", lambda given: made[given["checkpoint"]])
    return made["small"]


def test_options_defaults_and_texts_are_those_of_the_settings(capsys: Captured) -> None:
    options = vars(generate_parser().parse_args(["x"]))
    assert Sampling(**given_settings(options)) == Sampling()
    assert vars(Sampling()).keys() - options.keys() == set()
    with pytest.raises(SystemExit):
        generate_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--zero-eos-confidence Whether predictions of EOS are kept last (paper, B.4)" in text
    assert "{low_confidence,margin,entropy,random,random_count}" in text


def test_an_answer_is_printed_and_a_line_of_facts_beside_it(lm: LanguageModel, capsys: Captured) -> None:
    assert main(["generate", "small", "--prompt", "one two", *FEW]) == 0
    out, err = capsys.readouterr()
    expected = generate(lm, "one two", length=8, steps=4)
    assert expected.text is not None
    assert out == expected.text[0] + "\n"
    assert err.startswith("diffusion, low_confidence, 4 steps, 4 forward passes, ")
    assert err.endswith(f"tokens/s, cache none, finish {expected.finish[0]}\n") and err.count("\n") == 1


def test_every_setting_reaches_the_sampler(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def sampler(*given: object, **settings: object) -> object:
        seen.update(settings, prompts=given[1], sampling=given[2])
        return generate(lm, ["one", "two"], length=1)

    monkeypatch.setattr("llada_lightning.generation.sampler.generate", sampler)
    wanted = {
        "length": 16, "steps": 8, "block_length": 4, "strategy": "block_diffusion", "remasking": "margin",
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "cfg_scale": 1.5, "cache": "dual", "seed": 7,
        "compat": "llada",
    }  # fmt: skip
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]
    stop = ["--stop", r"\n\n", "--stop", "null", "--zero-eos-confidence"]
    assert main(["generate", "small", "--prompt", "null", "--prompt", "12", "--batch-size=2", *arguments, *stop]) == 0
    sampling = Sampling(**wanted, stop=["\n\n", "null"], zero_eos_confidence=True)  # type: ignore[arg-type]
    assert seen == {"batch_size": 2, "prompts": ["null", "12"], "sampling": sampling}


def test_json_is_strict_and_whole(lm: LanguageModel, capsys: Captured) -> None:
    assert main(["generate", "small", "--prompt", "one", "--prompt", "two three", *FEW, "--seed", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    record = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    expected = generate(lm, ["one", "two three"], length=8, steps=4, seed=3)
    for name in ("text", "tokens", "step_of_token", "finish", "forward_passes", "steps", "cache"):
        assert record[name] == getattr(expected, name), name
    assert record["confidence"] == [pytest.approx(values) for values in expected.confidence]
    assert record["prompts"] == ["one", "two three"] and record["prompt_tokens"] == expected.prompts
    assert (record["checkpoint"], record["objective"]) == ("small", "llada")
    assert record["settings"]["steps"] == 4 and record["settings"]["seed"] == 3
    assert record["settings"]["strategy"] == "diffusion" and record["settings"]["block_length"] == 8
    assert record["tokens_per_second"] == pytest.approx(sum(map(len, record["tokens"])) / record["seconds"])


def test_answers_and_picture_are_written(lm: LanguageModel, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": [60, 61]}\n')
    files = ["--out", str(tmp_path / "a.jsonl"), "--picture", str(tmp_path / "a.html")]
    assert main(["generate", "small", "--prompts-file", str(tmp_path / "p.jsonl"), *FEW, *files]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["one", [60, 61]]
    assert [len(line["tokens"]) == len(line["step_of_token"]) for line in lines] == [True, True]
    assert lines[0]["text"] == generate(lm, ["one", [60, 61]], length=8, steps=4).text[0]  # type: ignore[index]
    page = (tmp_path / "a.html").read_text()
    assert page.count("step 4: the darker, the later") == 2
    out = capsys.readouterr().out
    assert out.startswith("[1] one\n") and "[2] 60 61\n" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.jsonl", "p.jsonl"]


def test_gaps_are_filled_where_they_are(lm: LanguageModel, capsys: Captured) -> None:
    arguments = ["generate", "small", "--infill", "--json", "--prompt"]
    assert main([*arguments, "one[MASK:3] two[MASK]."]) == 0
    short = json.loads(capsys.readouterr().out)
    (steps,) = short["step_of_token"]
    assert sorted(steps)[-4:] == [1, 2, 3, 4] and steps.count(0) == len(steps) - 4
    assert short["text"][0].startswith("one") and short["text"][0].endswith(".")
    assert main([*arguments, "one[MASK][MASK][MASK] two[MASK]."]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == short["tokens"]


def test_a_default_length_is_what_the_context_leaves(
    lm: LanguageModel, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", "small", "--json", "--threshold", "0.001"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(options, "load", lambda _: speaking_model(context_length=30))
    assert main(["generate", "small", "--prompt", "one two", "--block-length", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    given = len(record["prompt_tokens"][0])
    length = record["settings"]["length"]
    assert length % 4 == 0 and 30 - 4 < given + length <= 30
    assert err == f"note: --length {length}: the context of 30 tokens leaves no more of 128\n"


def test_a_gap_that_stays_text_is_noted(lm: LanguageModel, capsys: Captured) -> None:
    assert main(["generate", "small", "--prompt", "a [MASK:4] b", *FEW]) == 0
    assert capsys.readouterr().err.startswith("note: [MASK] in a prompt is read as plain text; --infill fills it\n")


def test_the_file_of_the_prompts_is_not_replaced(lm: LanguageModel, capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\n')
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    for out in (path, link):
        assert main(["generate", "small", "--prompts-file", str(path), *FEW, "--out", str(out)]) == 2
        assert capsys.readouterr().err.endswith("is the file of the prompts; choose another file\n")
    assert path.read_text() == '{"prompt": "one"}\n'


def test_an_answer_that_ended_early_says_what_ran(lm: LanguageModel, capsys: Captured) -> None:
    arguments = ["generate", "arm", "--prompt", "one", "--length", "32", "--json"]
    assert main(arguments) == 0
    word = json.loads(capsys.readouterr().out)["text"][0][:1]
    assert main([*arguments, "--stop", word]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["finish"] == ["stop"]
    assert record["steps"] == record["forward_passes"] == len(record["tokens"][0]) < 32
    assert record["settings"]["steps"] == 32 and record["settings"]["cache"] == "kv"


@pytest.mark.parametrize("checkpoint", ["small", "arm"])
def test_text_from_nothing(lm: LanguageModel, checkpoint: str, capsys: Captured) -> None:
    assert main(["generate", checkpoint, "--length", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt_tokens"] == [[]] and len(record["tokens"][0]) >= 1


def test_a_prompt_from_stdin(lm: LanguageModel, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert main(["generate", "small", "--prompt", "-", *FEW, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == ["one"]


def test_the_released_sampler_is_repeated_by_its_seed(lm: LanguageModel, capsys: Captured) -> None:
    answers = []
    for seed in ("1", "2", "1"):
        given = ["generate", "small", "--prompt", "one", *FEW, "--compat", "llada", "--temperature", "1"]
        assert main([*given, "--seed", seed, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["tokens"])
    assert answers[0] == answers[2] != answers[1]


def test_more_steps_than_tokens_are_said_beside_the_answer(lm: LanguageModel, capsys: Captured) -> None:
    warn_once.cache_clear()
    assert main(["generate", "small", "--prompt", "one", "--length", "8", "--steps", "99", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: steps: 99 given for 8 tokens") and len(err.splitlines()) == 1
    assert json.loads(out)["settings"]["steps"] == 99


def test_on_a_terminal_the_answer_is_in_colour(
    lm: LanguageModel, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["generate", "small", "--prompt", "one", *FEW]) == 0
    out = capsys.readouterr().out
    assert "step 1 of 4" in out and "▒" in out
    assert "\x1b[?25l" in out and "\x1b[?25h" in out  # the cursor hides, and comes back


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--picture", "a.gif"], "its ending is none of .html, .svg"),
        (["--picture", "no/such/a.svg"], "there is no folder"),
        (["--out", "a.txt"], "give a .jsonl file"),
        (["--prompts-file", "none.txt"], "cannot be read"),
        (["--infill"], "no prompt given"),
        (["--infill", "--prompt", "a"], "holds no [MASK]"),
        (["--length", "9", "--block-length", "4"], "does not divide"),
        (["--length", "1000"], "was trained on"),
        (["--steps", "many"], "steps: many given; expected int or null"),
        (["--strategy", "guess"], "choose from"),
        (["--batch-size", "0"], "at least 1"),
        (["--threshold", "0.5", "--steps", "4"], "leave one out"),
    ],
)
def test_mistakes_in_one_line(
    lm: LanguageModel,
    arguments: list[str],
    words: str,
    capsys: Captured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "small", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and words in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(device: str, capsys: Captured) -> None:
    assert main(["generate", "small", "--device", device]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --device '{device}' cannot be used (") and len(err.splitlines()) == 1
