"""The model card of a converted folder: what a run says, what is not known, and text of others that stays text."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from golden_runs import workplace
from helpers.small_checkpoints import GOLDEN, described, golden_copy, in_memory, tokenizer_folder, written
from llada_lightning import load_model
from llada_lightning.checkpoints.card import model_card
from llada_lightning.checkpoints.convert import convert
from llada_lightning.commands.main import main
from llada_lightning.records import RESULT_COLUMNS

CHECKPOINT_STEP = workplace.CHECKPOINT_STEP


def run_with_a_result(folder: Path, name: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A committed run whose checkpoint is that of its result, which is changed as asked; and the record of it."""
    workplace.lay_out(folder)
    run = workplace.restore(name, folder, done=True)
    [*_, record] = json.loads((run / "result.json").read_text())
    record = {**record, "steps": CHECKPOINT_STEP, **changes}
    (run / "result.json").write_text(json.dumps([record]))
    shutil.rmtree(run / "branches", ignore_errors=True)
    return run, record


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text())


def rows(card: ModelCard) -> dict[str, str]:
    """The rows of the card's tables; backslashes, which keep text from being markup, left out."""
    found = re.findall(r"^\| (.+?) \| (.*) \|$", card.text, re.MULTILINE)
    return {name.replace("\\", ""): value.replace("\\", "") for name, value in found}


@pytest.mark.parametrize(
    ("name", "to", "library", "tags", "kind"),
    [
        ("arm-single", "llada", "llada-lightning", ["llada-lightning", "arm"], "exact"),
        ("arm-single", "hf-llama", "transformers", ["llada-lightning", "arm"], "exact"),
        ("llada-single", "hf-llada", "transformers", ["llada-lightning", "llada", "diffusion-language-model"], "bound"),
    ],
)
def test_the_card_says_what_the_run_says(
    tmp_path: Path, name: str, to: str, library: str, tags: list[str], kind: str
) -> None:
    run, record = run_with_a_result(tmp_path, name, variant="compat=llada;density=power:2")
    assert main(["convert", str(run), str(tmp_path / "out"), "--to", to]) == 0
    card = card_of(tmp_path / "out")
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags", "model-index"}  # no licence
    assert (card.data.library_name, card.data.pipeline_tag, card.data.tags) == (library, "text-generation", tags)
    assert card.data.eval_results is not None
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"nats_per_token": record["val_nats_per_token"], "bits_per_byte": record["val_bits_per_byte"]}
    table = rows(card)
    assert table["parameters with embeddings"].startswith(f"{record['params_total']:,} ")
    assert table["parameters without embeddings"] == f"{record['params_nonembedding']:,}"
    often = record["tokens"] / record["unique_tokens"]
    repeated = f"({record['unique_tokens']:,} of them unique: {often:.4g} epochs)"
    assert table["training tokens"] == f"{record['tokens']:,} {repeated}"
    assert table["optimizer"] == "AdamW, betas 0.9 and 0.95, eps 1e-08, weight decay 0.1"
    assert table["schedule"].startswith("linear warm-up from 0, constant rate")
    assert "**No licence is stated:**" in card.text and "`pip install .` in the clone" in card.text
    for row, key in {
        "6ND: 6 × parameters without embeddings × tokens": "flops_6nd",
        "attention": "flops_attention",
        "output head": "flops_head",
        "total of the three": "flops_total",
    }.items():
        assert float(table[row]) == pytest.approx(record[key], rel=1e-3)
    assert table["nats per token"] == f"{record['val_nats_per_token']:.4f} ± {record['val_stderr']:.4f}"
    assert (table["kind"], table["compat"], table["density"]) == (kind, "llada", "power:2")
    assert ("An upper bound" in card.text) == (kind == "bound")
    assert table["fingerprint of the data"] == record["data_fingerprint"]
    assert table["fingerprint of the tokenizer"] == record["tokenizer"]
    assert record["git_commit"] in table["trained with"] and "llada-lightning" in table["converted with"]


@pytest.mark.parametrize(("name", "to"), [("arm-single", "hf-llama"), ("llada-single", "llada")])
def test_what_it_says_about_loading_runs_as_it_stands(tmp_path: Path, name: str, to: str) -> None:
    run, _ = run_with_a_result(tmp_path, name)
    assert main(["convert", str(run), str(tmp_path / "out"), "--to", to]) == 0
    blocks = re.findall(r"```python\n(.+?)```", card_of(tmp_path / "out").text, re.DOTALL)
    assert len(blocks) == (2 if to == "hf-llama" else 1)
    for block in blocks:
        assert "FOLDER" in block
        exec(block.replace("FOLDER", str(tmp_path / "out")), {})


def test_a_run_without_a_result_has_no_loss_and_the_flops_of_its_tokens(tmp_path: Path) -> None:
    workplace.lay_out(tmp_path)
    run = workplace.restore("arm-single", tmp_path, done=False)
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    card, table = card_of(tmp_path / "out"), rows(card_of(tmp_path / "out"))
    assert card.data.eval_results is None and "Validation loss" not in card.text and "defaults" not in card.text
    assert table["training tokens"] == "586" and table["optimizer steps"] == f"{CHECKPOINT_STEP}"
    [flops] = [value for name, value in table.items() if name.startswith("6ND")]
    assert float(flops) == pytest.approx(6 * 1192 * 586, rel=1e-3) and "attention" not in table
    assert table["peak learning rate"] == "0.02"


def test_what_the_loss_was_measured_on_is_told_and_goes_along(tmp_path: Path) -> None:
    run, record = run_with_a_result(tmp_path, "arm-single")
    table = (
        f"steps,document,sequences,nats_per_token\n9,0,7,5.0\n{CHECKPOINT_STEP},0,3,5.0\n{CHECKPOINT_STEP},4,1,5.5\n"
    )
    (run / "validation.csv").write_text(table)
    for source, out in ((run, "ours"), (tmp_path / "ours", "again")):
        assert main(["convert", str(source), str(tmp_path / out)]) == 0
    length = record["sequence_length"]
    said = f"measured on 4 sequences of {length} tokens ({4 * length} in all) from 2 documents."
    assert said in card_of(tmp_path / "ours").text and said in card_of(tmp_path / "again").text
    (run / "validation.csv").unlink()
    assert main(["convert", str(run), str(tmp_path / "without")]) == 0
    assert "measured on" not in card_of(tmp_path / "without").text


def test_the_schedule_and_the_optimizer_are_told_in_words(tmp_path: Path) -> None:
    plateaus = [{"lr": 1e-4, "from_tokens": 5e6}]
    schedule = {"lr": 4e-4, "warmup_steps": 2, "decay_steps": 0, "plateaus": plateaus}
    settings = {"schedule": schedule, "optimizer": {"name": "muon", "weight_decay": 0.5}}
    facts = {"identity": {"model": {"init_args": settings}, "trainer": {"gradient_clip_val": 0.5}}}
    table = rows(ModelCard(model_card(in_memory(described("arm")), "llada", "float32", facts)))
    assert table["schedule"] == "linear warm-up from 0, constant rate (0.0001 from 5e+06 tokens on)"
    assert table["optimizer"] == "Muon for the matrices of the blocks, AdamW for the rest, weight decay 0.5"
    assert table["clipping of the gradient"] == "to a norm of 0.5"


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_one_version_of_transformers_is_installed_and_the_page_of_serving_agrees(
    tmp_path: Path, with_tokenizer: bool
) -> None:
    tokenizer = tokenizer_folder(tmp_path / "tokenizer") if with_tokenizer else None
    text = card_of(written(tmp_path / "out", "hf-llada", "llada", tokenizer)).text
    assert "transformers==4.57.6" in text and "4.38.2" in text and "==4.38.2" not in text
    assert "\\`" not in text and not re.search(r"[a-z]\.[A-Z]", text)
    serving = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert "transformers==4.57.6" in serving and "4.38.2" in serving


def test_a_run_that_diverged_has_no_loss(tmp_path: Path) -> None:
    run, _ = run_with_a_result(tmp_path, "arm-single", val_nats_per_token=None, val_stderr=None, status="diverged")
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    assert "Validation loss" not in card_of(tmp_path / "out").text
    assert rows(card_of(tmp_path / "out"))["status"] == "diverged"


def test_fine_tuning_is_told_and_its_loss_is_of_responses(tmp_path: Path) -> None:
    run, _ = run_with_a_result(tmp_path, "arm-sft")
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    text = card_of(tmp_path / "out").text
    assert "It was fine-tuned on dialogues with llada-lightning," in text and "of held-out responses" in text


def test_what_is_known_goes_along_from_folder_to_folder(tmp_path: Path) -> None:
    run, record = run_with_a_result(tmp_path, "arm-single")
    for source, out, to in ((run, "ours", "llada"), ("ours", "theirs", "hf-llama"), ("theirs", "again", "llada")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / out), "--to", to]) == 0
    ours, again = (card_of(tmp_path / name) for name in ("ours", "again"))
    assert str(ours) == str(again) and rows(ours)["nats per token"].startswith(f"{record['val_nats_per_token']:.4f}")
    told = json.loads((tmp_path / "theirs" / "training.json").read_text())
    assert told["record"] == record and told["identity"]["tokenizer"] == record["tokenizer"]


@pytest.mark.parametrize("spoilt", ["another run's", "damaged", "a list"])
def test_a_file_that_is_not_of_the_model_is_not_believed(tmp_path: Path, spoilt: str) -> None:
    run, _ = run_with_a_result(tmp_path, "arm-single")
    assert main(["convert", str(run), str(tmp_path / "ours")]) == 0
    path = tmp_path / "ours" / "training.json"
    facts = json.loads(path.read_text())
    facts["identity"]["seed"] = 8
    path.write_text({"another run's": json.dumps(facts), "damaged": "{", "a list": "[1]"}[spoilt])
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to=hf-llama"]) == 0
    assert "## Training" not in card_of(tmp_path / "theirs").text
    assert not (tmp_path / "theirs" / "training.json").exists()
    load_model(tmp_path / "ours", device="cpu")


def test_of_a_folder_of_others_nothing_is_invented(tmp_path: Path) -> None:
    assert main(["convert", str(GOLDEN), str(tmp_path / "out")]) == 0
    card = card_of(tmp_path / "out")
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    for heading in ("## Training", "### Training FLOPs", "## Validation loss"):
        assert heading not in card.text
    assert "trained by masked diffusion" in card.text and "The training ran" not in card.text
    assert rows(card)["parameters with embeddings"].startswith("229,952 ")


def test_a_card_that_somebody_wrote_is_neither_overwritten_nor_taken_for_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = golden_copy(tmp_path / "theirs")
    (theirs / "README.md").write_text("# Mine")
    assert main(["convert", str(GOLDEN), str(theirs)]) == 2
    assert "is there already and is not empty; choose another name" in capsys.readouterr().err
    assert main(["convert", str(theirs), str(tmp_path / "out")]) == 0
    assert (theirs / "README.md").read_text() == "# Mine" and "Mine" not in str(card_of(tmp_path / "out"))


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    name = "<script>|![x](http://y)**a**\n# b `c`"
    run, _ = run_with_a_result(
        tmp_path, "arm-single", run=name, device="a | b", variant="x=<b>", val_held_out={name: {"nats_per_token": 1.5}}
    )
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    card = card_of(tmp_path / "out")
    assert card.data.model_name is not None and "<script>" in card.data.model_name  # a text of YAML
    assert "<script>" not in card.text and "&lt;script&gt;\\|!\\[x\\](http://y)\\*\\*a\\*\\*" in card.text
    assert "| a \\| b |" in card.text and "| x | &lt;b&gt; |" in card.text
    headings = [line for line in card.text.splitlines() if line.startswith("# ")]
    assert len(headings) == 1 and headings[0].endswith("\\# b \\`c\\`")


@pytest.mark.parametrize("value", ["a text", -1, math.inf, True, [], {}, None, 10**400])
def test_values_of_strangers_do_not_break_the_card(value: Any) -> None:
    model = in_memory(described("arm"))
    facts = {"identity": value, "tokens": value, "steps": value, "record": dict.fromkeys(RESULT_COLUMNS, value)}
    ModelCard(model_card(model, "llada", "float32", facts))
    ModelCard(model_card(model, "llada", "float32", {**facts, "record": value}))


def test_every_objective_is_described(tmp_path: Path) -> None:
    block = described("block", block_length=8)
    for description, said in ((block, "blocks of 8 tokens"), (described("uniform"), "uniform-state diffusion")):
        convert(in_memory(description), tmp_path / description.objective, "llada")
        assert said in card_of(tmp_path / description.objective).text


def test_without_a_tokenizer_the_examples_take_ids(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", "hf-llama", "arm")
    text = card_of(folder).text
    assert "This folder has no tokenizer: put the token there yourself." in text and "Once upon" not in text
    [block, _] = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    exec(block.replace("FOLDER", str(folder)), {})
    with_one = in_memory(replace(described("arm"), start_token_id=None), tokenizer_folder(tmp_path / "tokenizer"))
    convert(with_one, tmp_path / "none", "hf-llama")
    assert "before every sequence" not in card_of(tmp_path / "none").text
