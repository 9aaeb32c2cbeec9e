"""Training from a Llama of others: everything that inference reads of it holds for the run, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_checkpoints import BOS, EOS, changed_config, tokenizer_folder, written
from llada_lightning.checkpoints import load_model
from llada_lightning.checkpoints.convert import convert
from llada_lightning.checkpoints.stored_model import open_checkpoint
from llada_lightning.commands.main import main
from llada_lightning.data.chat import Message
from llada_lightning.generation.prompts import conversation_ids
from llada_lightning.objectives.batches import ValidationBatch
from llada_lightning.support.errors import UserError
from llada_lightning.training.modules import ArmModule, LladaModule

SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64}
READ = ("mask_token_id", "eos_token_id", "context_length", "end_token_ids", "start_token_id", "text_prefix_ids")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """As it comes: another eps than ours, BOS before a text, two ends of an answer, no [MASK], a <pad> too many."""
    folder = written(tmp_path / "llama", "hf-llama", "arm", vocab_size=259, norm_eps=1e-2)
    changed_config(folder, llada_lightning=..., eos_token_id=[EOS, 257], bos_token_id=BOS, pad_token_id=-1)
    return tokenizer_folder(folder, bos=True, special=("[EOS]", "<turn>", "<bos>", "<pad>"))


def arguments(start: Path, root: Path, *extra: str, model: str = "ArmModule") -> list[str]:
    pairs = root / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{n}+1", "response": f"{n + 1}"}) + "\n" for n in range(8)))
    return [
        "fit",
        f"--model={model}",
        "--data=SftDataModule",
        f"--model.weights={start}",
        f"--data.path={pairs}",
        "--data.global_batch=4",
        "--data.epochs=1",
        "--data.val_fraction=0.2",
        "--model.schedule.warmup_steps=1",
        "--model.schedule.lr=1e-30",
        "--model.schedule.final_lr=1e-31",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        f"--run.root={root}",
        "--run.study=test",
        "--run.name=run",
        *extra,
    ]


def same(first: Any, second: Any) -> None:
    """Two models that inference cannot tell apart."""
    tokens_BL = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.logits(tokens_BL), second.logits(tokens_BL))
    assert {key: getattr(first, key) for key in READ} == {key: getattr(second, key) for key in READ}
    assert first.encode_prompt("text") == second.encode_prompt("text")


def test_what_inference_reads_survives_fine_tuning(llama: Path, tmp_path: Path) -> None:
    assert main(arguments(llama, tmp_path)) == 0
    run = tmp_path / "test" / "run"
    before, after = load_model(llama, device="cpu"), load_model(run, device="cpu")
    same(before, after)
    assert (after.model.norm_eps, after.text_prefix_ids, after.end_token_ids) == (1e-2, (BOS,), (EOS, 257))
    assert after.mask_token_id is None and after.start_token_id is None
    prompt = conversation_ids(after, [Message("user", "3+1 <bos>")])
    assert prompt == [BOS, *after.encode("user:\n3+1 <bos>\n\nassistant:\n")]
    saved = torch.load(next((run / "checkpoints").glob("*.ckpt")))
    model = saved["identity"]["model"]["init_args"]
    assert (model["norm_eps"], model["text_prefix_ids"]) == (1e-2, [BOS])
    assert not {"mask_token", "eos_token", "vocab_size", "text_prefix_ids"} & set(saved["identity"]["data"])
    convert(open_checkpoint(run), tmp_path / "out", "hf-llama")
    same(before, load_model(tmp_path / "out", device="cpu"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["pad_token_id"], config["rms_norm_eps"]) == (BOS, None, 1e-2)


def test_what_contradicts_the_weights_or_is_missing_is_named(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "model.norm_eps: 0.001 given, but model.weights has 0.01": ["--model.norm_eps=1e-3"],
        "model.rope_theta: 7.0 given, but model.weights has 500000.0": ["--model.rope_theta=7"],
        "model.text_prefix_ids: [5] given, but model.weights has [258]": ["--model.text_prefix_ids=[5]"],
        "model.compat: llada given, but model.weights has None": ["--model.compat=llada"],
        "name one with --data.mask_token": ["--data.mask_token=<none>"],
    }
    for message, extra in wrong.items():
        assert main(arguments(llama, tmp_path, *extra)) == 2
        assert message in capsys.readouterr().err
    alone = [f"--data.tokenizer={llama}", "--data.context_length=64", "--model.weights=null"]
    assert main(arguments(llama, tmp_path, *alone, model="LladaModule")) == 2
    assert "has no [MASK], which llada needs; name one of its tokens with --data.mask_token" in capsys.readouterr().err
    assert not (tmp_path / "test").exists()


def batch_of(tokens_BL: torch.Tensor, response_BL: torch.Tensor | None = None) -> ValidationBatch:
    length = tokens_BL.shape[1]
    masked_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    masked_BL[:, length // 2 :] = True
    ones_B = torch.ones(len(tokens_BL), dtype=torch.bool)
    return ValidationBatch(tokens_BL, masked_BL, ones_B, ones_B.long(), response_BL=response_BL)


@pytest.mark.parametrize("prefix", [None, [], [7], [7, 8]])
def test_the_loss_of_a_text_is_behind_its_prefix_and_of_a_dialogue_behind_nothing(prefix: list[int] | None) -> None:
    module = ArmModule(SHAPE, vocab_size=40, eos_token_id=3, text_prefix_ids=prefix)
    module.configure_model()
    tokens_BL = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))

    def nll(start: list[int], first: int) -> torch.Tensor:
        whole_BL = torch.cat([torch.tensor(start, dtype=torch.long).expand(2, -1), tokens_BL], dim=1)
        logits_BLV = module.model(whole_BL[:, :-1], causal=True).log_softmax(-1)
        own_BL = logits_BLV.gather(2, whole_BL[:, 1:, None])[..., 0]
        return -own_BL[:, len(start) - 1 + first :].sum(1).double()

    with torch.no_grad():
        torch.testing.assert_close(module.sequence_nll(batch_of(tokens_BL)), nll(prefix or [3], 0), atol=1e-4, rtol=0)
        response_BL = (torch.arange(9) >= 4).expand(2, -1)
        found_B = module.sequence_nll(batch_of(tokens_BL, response_BL))
        expected_B = nll([3] if prefix is None else [], 4)
        torch.testing.assert_close(found_B, expected_B, atol=1e-4, rtol=0)


def test_llada_sees_the_prefix_of_a_text_and_predicts_none_of_it() -> None:
    tokens_BL = torch.randint(4, 40, (2, 8), generator=torch.Generator().manual_seed(1))
    module = LladaModule(SHAPE, vocab_size=40, mask_token_id=2, eos_token_id=3, text_prefix_ids=[7, 8])
    module.configure_model()
    batch = batch_of(tokens_BL)
    with torch.no_grad():
        noisy_BL = tokens_BL.masked_fill(batch.masked_BL, 2)
        whole_BL = torch.cat([torch.tensor([[7, 8]]).expand(2, -1), noisy_BL], dim=1)
        hidden_BLD = module.model.hidden(whole_BL, causal=False)[:, 2:]
        log_probs_BLV = module.model.head(hidden_BLD).index_fill(2, torch.tensor(2), -torch.inf).log_softmax(-1)
        own_BL = log_probs_BLV.gather(2, tokens_BL[..., None])[..., 0].masked_fill(~batch.masked_BL, 0)
        expected_B = -own_BL.double().sum(1) * 8 / batch.masked_BL.sum(1)
        torch.testing.assert_close(module.sequence_nll(batch), expected_B, atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-300])
@pytest.mark.parametrize("name", ["rope_theta", "norm_eps"])
def test_numbers_of_the_model_that_are_none(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^model.{name}: {value} given; it must be a finite number above 0"):
        ArmModule(SHAPE, vocab_size=40, **{name: value})


def test_sizes_beyond_any_memory_are_refused_before_anything_is_built() -> None:
    for wrong, message in (
        ({"shape": {**SHAPE, "n_layers": 10**8}}, "n_layers is 100000000; it must be at most 10000"),
        ({"shape": {**SHAPE, "d_ff": 10**18}}, "d_ff is 1000000000000000000; it must be at most"),
        (
            {"shape": {**SHAPE, "n_layers": 9999, "d_model": 2**18, "d_ff": 2**20}},
            "model.shape: 1.*parameters; no memory",
        ),
        ({"vocab_size": 10**18}, "model.vocab_size: 1000000000000000000 given"),
        ({"vocab_size": 40, "text_prefix_ids": [40]}, "model.text_prefix_ids: 40 is no id of the vocabulary of 40"),
    ):
        with pytest.raises(UserError, match=message):
            ArmModule(**{"shape": SHAPE, **wrong})  # type: ignore[arg-type]
