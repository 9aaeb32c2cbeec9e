"""EOS before every sequence of an exported `arm`: put into its tokenizer for other programs, and taken out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.small_checkpoints import BOS, EOS, MASK, SPECIAL, described, in_memory, tokenizer_folder, written
from llada_lightning import generate, load_model, log_likelihood
from llada_lightning.checkpoints.convert import convert
from llada_lightning.checkpoints.stored_model import open_checkpoint
from llada_lightning.data.chat import LLADA_TEMPLATE, Message
from llada_lightning.data.start_token import with_start_token, without_start_token
from llada_lightning.data.tokenizers import TokenizerFiles, load_tokenizer

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DIALOGUE = [{"role": "user", "content": "Say hi."}]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokenizer(folder: Path, kind: str) -> Path:
    """A tokenizer as users have them: alone, with a post-processor of its own, with files beside it."""
    folder = tokenizer_folder(folder, bos=kind in ("bos", "compact"), special=(*SPECIAL, "<|eot_id|>"))
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text())
    beside: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "[EOS]"}
    if kind == "byte level":
        record["post_processor"] = json.loads(processors.ByteLevel(trim_offsets=True).__getstate__())
    elif kind == "sequence":
        parts = [
            processors.ByteLevel(),
            processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)]),
        ]
        record["post_processor"] = json.loads(processors.Sequence(parts).__getstate__())
    elif kind == "no key":
        del record["post_processor"]
    path.write_text(json.dumps(record, indent=None if kind == "compact" else 2, ensure_ascii=False))
    if kind == "template in a file":
        (folder / "chat_template.jinja").write_text("\n" + TEMPLATE)
        roles = {"bos_token": None, "eos_token": "[EOS]"}
        (folder / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")
    elif kind == "named templates":
        beside["chat_template"] = [{"name": name, "template": TEMPLATE + name} for name in ("default", "rag")]
    if kind in ("named templates", "bos"):
        config = {**beside, "add_bos_token": False, "name": "é"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return folder


KINDS = (
    "alone", "compact", "bos", "byte level", "sequence", "no key", "template in a file", "named templates",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_comes_and_goes_and_every_other_byte_stays(tmp_path: Path, kind: str) -> None:
    folder = tokenizer(tmp_path / "tokenizer", kind)
    ours = written(tmp_path / "ours", "llada", "arm", folder)
    theirs, again, theirs_again = tmp_path / "theirs", tmp_path / "again", tmp_path / "theirs again"
    convert(open_checkpoint(ours), theirs, "hf-llama")
    convert(open_checkpoint(theirs), again, "llada")
    convert(open_checkpoint(again), theirs_again, "hf-llama")
    assert contents(again) == contents(ours)
    assert contents(theirs_again) == contents(theirs)
    assert contents(ours)["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()

    their = AutoTokenizer.from_pretrained(theirs)
    plain = load_model(ours, device="cpu").encode("12 é")
    assert their("12 é").input_ids == [EOS, *plain] and their("12 é", add_special_tokens=False).input_ids == plain
    assert their("12 é", "b").input_ids[len(plain) + 1] == EOS
    assert (their.bos_token_id, their.eos_token_id) == (EOS, EOS)


def test_our_own_programs_read_the_tokenizer_without_it(tmp_path: Path) -> None:
    """Else the token would be there twice, and data prepared with the tokenizer would be other data."""
    folder = tokenizer(tmp_path / "tokenizer", "byte level")
    theirs = written(tmp_path / "theirs", "hf-llama", "arm", folder)
    lm = load_model(theirs, device="cpu")
    assert (lm.text_prefix_ids, lm.start_token_id) == ((), EOS)
    (_, info), (_, info_before) = load_tokenizer(str(theirs)), load_tokenizer(str(folder))
    assert info == info_before


@pytest.mark.parametrize("damage", [{"llada_lightning": 3}, {"llada_lightning": {"chat_prefix": "", "before": {}}}])
def test_a_key_of_someone_else_changes_nothing(tmp_path: Path, damage: dict[str, Any]) -> None:
    folder = tokenizer(tmp_path / "tokenizer", "bos")
    (folder / "tokenizer_config.json").write_text(json.dumps(damage))
    before = contents(folder)
    assert without_start_token(before) == before
    assert TokenizerFiles.of_path(folder).files == before


def test_llada_and_our_own_layout_have_no_such_token(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "tokenizer", "alone")
    for to, objective in (("hf-llada", "llada"), ("llada", "arm")):
        found = written(tmp_path / to, to, objective, folder)
        assert (found / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert b"add_bos_token" not in (found / "tokenizer_config.json").read_bytes()


def test_a_rendered_dialogue_has_it_once(tmp_path: Path) -> None:
    """No post-processor runs over a rendered dialogue, so the template has it; other BOS of the template stay."""
    folder = tokenizer(tmp_path / "tokenizer", "alone")
    config = {"bos_token": "<bos>", "eos_token": "[EOS]"}
    for name, template in (("released", LLADA_TEMPLATE), ("ours", "\n" + TEMPLATE)):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        ours = written(tmp_path / f"{name} ours", "llada", "arm", folder)
        convert(open_checkpoint(ours), theirs := tmp_path / f"{name} theirs", "hf-llama")
        dialogue, their = load_model(ours, device="cpu").dialogue, AutoTokenizer.from_pretrained(theirs)
        assert dialogue is not None
        ids = dialogue.ids([Message("user", "Say hi.")])
        assert BOS in ids and EOS not in ids
        asked = {"add_generation_prompt": True, "return_dict": False}
        assert their.apply_chat_template(DIALOGUE, tokenize=True, **asked) == [EOS, *ids]
        again = load_model(theirs, device="cpu").dialogue
        assert again is not None and again.ids([Message("user", "Say hi.")]) == ids


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model for us and for transformers; its first choices depend on the EOS before the sequence."""
    root = tmp_path_factory.mktemp("pair")
    model = in_memory(described("arm"), tokenizer_folder(root / "tokenizer"))
    for name, to in (("ours", "llada"), ("theirs", "hf-llama")):
        convert(model, root / name, to)
    return root / "ours", root / "theirs"


def test_generate_of_transformers_goes_on_as_ours(pair: tuple[Path, Path]) -> None:
    lm, tokenizer = load_model(pair[0], device="cpu"), AutoTokenizer.from_pretrained(pair[1])
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    for prompt in ("ab", "x = 1", "The end"):
        ours = generate(lm, [prompt], length=20, temperature=0.0)
        inputs = tokenizer(prompt, return_tensors="pt")
        theirs = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert ours.tokens[0] == theirs.tolist()[: len(ours.tokens[0])] and len(ours.tokens[0]) > 0
        with torch.no_grad():  # without the token before it, the model writes something else
            bare = model.generate(inputs.input_ids[:, 1:], max_new_tokens=20, do_sample=False)[
                0, inputs.input_ids.shape[1] - 1 :
            ]
        assert bare.tolist() != theirs.tolist()


def test_mask_is_drawn_by_nobody(tmp_path: Path) -> None:
    """The model prefers [MASK], which had no probability in training, to every other token."""
    model = in_memory(described("arm"), tokenizer_folder(tmp_path / "tokenizer"))
    weights = {**model.weights}
    head = weights["head.weight"].read()
    logits_of_mask = torch.zeros_like(head[0])
    convert(model, tmp_path / "theirs", "hf-llama")
    lm, theirs = (
        load_model(tmp_path / "theirs", device="cpu"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"),
    )
    with torch.no_grad():
        for weight in (lm.model.head.weight, theirs.lm_head.weight):
            weight[:] = logits_of_mask
            weight[MASK] = head[0]
            weight[5] = -head[0]
    ids = torch.tensor([[EOS, 1, 2, 3]])
    written_by = {
        "ours": generate(lm, [[1, 2, 3]], length=8, temperature=0.0).tokens[0],
        "theirs": theirs.generate(ids, max_new_tokens=8, do_sample=False)[0, 4:].tolist(),
    }
    assert written_by["ours"] == written_by["theirs"] and MASK not in written_by["ours"]


def test_lm_eval_scores_as_we_do(pair: tuple[Path, Path]) -> None:
    """By its class for folders of transformers, with its defaults."""
    theirs = HFLM(pretrained=str(pair[1]), device="cpu", dtype="float32", batch_size=1)
    lm = load_model(pair[0], device="cpu")
    context, continuation = "x =", " 12"
    asked = Instance("loglikelihood", {}, (context, continuation), 0)
    [(found, _)] = theirs.loglikelihood([asked], disable_tqdm=True)
    ours = log_likelihood(lm, [(lm.encode(context), lm.encode(continuation))])
    # lm-eval gives [MASK] the probability that the weights give it.
    logits_BLV = lm.logits(torch.tensor([[EOS, *lm.encode(context + continuation)]]))
    share = logits_BLV[0, -4:-1].log_softmax(-1)[:, MASK].exp()
    assert found == pytest.approx(ours[0].mean + float(torch.log1p(-share).sum()), abs=1e-4)


def test_the_function_keeps_what_it_replaces(tmp_path: Path) -> None:
    files = {"tokenizer.json": b'{"a": [1,  2],"post_processor" :null , "b":"x"}', "tokenizer_config.json": b'{"a": 1}'}
    changed = with_start_token(files, "[EOS]", 5, "<s>")
    head, rest = changed["tokenizer.json"].split(b'"post_processor" :')
    assert head == b'{"a": [1,  2],' and rest.endswith(b' , "b":"x"}')
    assert json.loads(changed["tokenizer.json"])["post_processor"]["special_tokens"]["[EOS]"]["ids"] == [5]
    assert json.loads(changed["tokenizer_config.json"])["bos_token"] == "[EOS]"
    restored = without_start_token(changed)
    assert restored["tokenizer.json"] == files["tokenizer.json"]
    assert json.loads(restored["tokenizer_config.json"]) == {"a": 1}
