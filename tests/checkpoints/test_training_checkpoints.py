"""Checkpoints of `llada fit` as models: files, shards, runs, branches; strangers' pickles are never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning import Trainer

from helpers.small_checkpoints import described, tokenizer_folder, training_content, write_shards
from helpers.tiny_runs import fit, fit_process, weights
from llada_lightning import load_model
from llada_lightning.checkpoints.run_folder import META, _IndexUnpickler, final_checkpoint, is_sharded, read_sharded
from llada_lightning.checkpoints.stored_model import open_checkpoint
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.data.tokenizers import train_tokenizer
from llada_lightning.model.head import token_nll
from llada_lightning.objectives.llada import nll_bound
from llada_lightning.support.errors import UserError


@pytest.fixture(scope="module", params=["arm", "llada"])
def run(request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(request.param, prepared, tmp_path_factory.mktemp(request.param))


def test_a_run_its_checkpoints_folder_and_its_last_file_are_the_same_model(run: Path, prepared: Path) -> None:
    objective = run.parents[1].name.rstrip("0123456789")
    last = run / "checkpoints" / "step=00000024.ckpt"
    for path in (run, run / "checkpoints", last):
        lm = load_model(path, device="cpu")
        for name, weight in weights(run).items():
            assert torch.equal(lm.model.state_dict()[name.removeprefix("model.")], weight)
        assert (lm.objective, lm.context_length, lm.mask_token_id, lm.eos_token_id) == (objective, 32, 1, 0)
        assert lm.start_token_id == (0 if objective == "arm" else None)
        assert lm.text_prefix_ids == () and lm.compat is None and lm.tokenizer is not None
    source = open_checkpoint(run).description.source
    assert (source["run"], source["step"], len(source["identity"])) == ("run", 24, 64)
    earlier = load_model(run / "checkpoints" / "step=00000020.ckpt", device="cpu")
    assert not torch.equal(earlier.model.head.weight, weights(run)["model.head.weight"])


def test_it_gives_the_loss_that_the_run_recorded(run: Path, prepared: Path) -> None:
    """All conventions at once (start token, [MASK]'s logit): the validation loss by `lm.logits` is the record's."""
    lm = load_model(run, device="cpu")
    data = TokenDataModule(str(prepared), sequence_length=32, global_batch=8, val_sequences=24)
    data.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    total = count = 0.0
    for batch in data.val_dataloader():
        tokens_BL = batch.tokens_BL
        if lm.objective == "arm":
            assert lm.start_token_id is not None
            start_B1 = tokens_BL.new_full((len(tokens_BL), 1), lm.start_token_id)
            logits_BLV = lm.logits(torch.cat([start_B1, tokens_BL[:, :-1]], dim=1))
            nll_N = token_nll(logits_BLV.flatten(0, 1).clone(), tokens_BL.flatten(), lm.excluded_token_id)
            nll_B = nll_N.view_as(tokens_BL).sum(dim=1)
        else:
            assert lm.mask_token_id is not None
            logits_BLV = lm.logits(tokens_BL.masked_fill(batch.masked_BL, lm.mask_token_id))
            masked = batch.masked_BL
            nll_B = nll_bound(token_nll(logits_BLV[masked], tokens_BL[masked], lm.excluded_token_id), masked)
        total += float(nll_B[batch.counted_B].sum())
        count += 32 * int(batch.counted_B.sum())
    [record] = json.loads((run / "result.json").read_text())
    assert total / count == pytest.approx(record["val_nats_per_token"], abs=1e-5)


def test_a_moved_run_keeps_its_tokenizer_and_an_older_one_finds_its_datas(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    text = "12 plus 3 is 15"
    ids = load_model(run, device="cpu").encode(text)
    assert load_model(moved, device="cpu").encode(text) == ids
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").unlink()  # half a copy
    assert load_model(moved, device="cpu").encode(text) == ids
    (moved / "config.yaml").write_text(config)
    (moved / "tokenizer.json").unlink()  # a run of before: its config.yaml names the data
    assert load_model(moved, device="cpu").encode(text) == ids
    (moved / "config.yaml").write_text(config.replace("path: ", "path: /nowhere"))
    assert load_model(moved, device="cpu").tokenizer is None
    given = load_model(moved, tokenizer=run / "tokenizer.json", device="cpu")
    assert given.encode(text) == ids


@pytest.mark.parametrize("other", ["other", "damaged"])
def test_another_tokenizer_in_a_runs_folder_is_not_taken_for_its_own(
    run: Path, tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace("path: ", "path: /nowhere"))
    (moved / "tokenizer.json").write_text(train_tokenizer(["text"], 300).to_str() if other == "other" else "{}")
    capsys.readouterr()
    assert load_model(moved, device="cpu").tokenizer is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: '{moved / 'tokenizer.json'}' is not the tokenizer that '{moved}/checkpoints/step="
    )
    assert line.endswith("was trained with, and is left out; give the run's own with --tokenizer")
    (moved / "tokenizer.json").unlink()
    load_model(moved, device="cpu")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", ["{}", "{{'{}': 1.0}}", "{{'{}': 0.5, 7: 0.5}}", '"a\\0b"'])
def test_a_strangers_config_opens_no_connection(tmp_path: Path, path: str) -> None:
    """Its data may lie anywhere; a server of this process sees whether anybody asks."""
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    (tmp_path / "checkpoints").mkdir()
    torch.save(training_content(described("llada")), tmp_path / "checkpoints" / "step=00000007.ckpt")
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}/data"
        (tmp_path / "config.yaml").write_text(f"data: {{init_args: {{path: {path.format(place)}}}}}")
        lm = load_model(tmp_path, device="cpu")
        server.shutdown()
    assert asked == [] and lm.tokenizer is None
    with pytest.raises(UserError, match=r"has no tokenizer, so text cannot be read; give --tokenizer"):
        lm.encode("text")


def test_a_branch_and_its_family(prepared: Path, tmp_path: Path) -> None:
    """The family's folder gives its longest branch; a branch's own folder gives that branch."""
    flops = [float(steps * 8 * 32 * 6 * 12_000) for steps in (4, 8)]
    family = fit("llada", prepared, tmp_path, "--trainer.max_steps=-1", f"--budget.flops={flops}")
    branches = sorted((family / "branches").iterdir(), key=lambda path: int(path.name))
    assert len(branches) == 2
    for branch in branches:
        lm = load_model(branch, device="cpu")
        saved = torch.load(sorted((branch / "checkpoints").glob("*.ckpt"))[-1])["state_dict"]
        assert torch.equal(lm.model.head.weight, saved["model.head.weight"])
        assert lm.tokenizer is not None
    assert final_checkpoint(family) == open_checkpoint(family).path
    assert open_checkpoint(family).path.parents[1] == branches[-1]
    assert open_checkpoint(branches[0]).description.source["run"] == "run"


def test_a_run_in_shards(prepared: Path, tmp_path: Path) -> None:
    """Two processes, FSDP2: a folder is read as the file that one process would have written."""
    done = fit_process(
        "arm", prepared, tmp_path, "--trainer.devices=2", "--trainer.strategy=fsdp2", "--trainer.max_steps=3"
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "test" / "run"
    [last, *_] = sorted((run / "checkpoints").glob("*.ckpt"))[::-1]
    assert is_sharded(last)
    assert load_model(run, device="cpu").encode("12") == load_model(last, device="cpu").encode("12")
    one = fit("arm", prepared, tmp_path / "one", "--trainer.max_steps=3")
    mine, theirs = (load_model(path, device="cpu").model.state_dict() for path in (last, one))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-5, rtol=0)


def test_shards_are_read_bit_for_bit(tmp_path: Path) -> None:
    content = training_content(described("llada"), moments=True)
    write_shards(tmp_path / "step=00000007.ckpt", content)
    lm = load_model(tmp_path, device="cpu")
    for name, weight in content["state_dict"].items():
        assert torch.equal(lm.model.state_dict()[name.removeprefix("model.")], weight)


def test_a_module_of_the_users_says_its_objective_itself(tmp_path: Path) -> None:
    content = training_content(described("arm"))
    content["identity"]["model"]["class_path"] = "somewhere.MyModule"
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"is of somewhere.MyModule, whose objective it does not name"):
        load_model(tmp_path / "a.ckpt")
    torch.save({**content, "objective": "arm"}, tmp_path / "a.ckpt")
    assert load_model(tmp_path / "a.ckpt", device="cpu").objective == "arm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compat": "foo"}, 'compat is "foo"; it must be null or llada'),
        ({"rope_theta": "x"}, 'rope_theta is "x"; it must be a finite number above 0'),
        ({"rope_theta": float("nan")}, "rope_theta is NaN; it must be a finite number above 0"),
        ({"vocab_size": "x"}, 'vocab_size is "x"; it must be a whole number of at least 1'),
        ({"eos_token_id": None}, "eos_token_id is null; it must be an id of the vocabulary, 0 to 271"),
        ({"mask_token_id": None}, r"mask_token_id is null; give the id of \[MASK\]"),
        ({"shape": "zzz"}, "shape: 'zzz' is not known"),
    ],
)
def test_a_wrong_argument_of_the_model(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    torch.save(training_content(described("llada"), **arguments), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"a.ckpt': {message}"):
        load_model(tmp_path / "a.ckpt", device="cpu")


def test_wrong_values_beside_the_models_arguments(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    content = training_content(described("llada"))
    torch.save({**content, "objective": "foo"}, path)
    with pytest.raises(UserError, match=r"a.ckpt': objective is \"foo\"; it must be arm or llada"):
        load_model(path, device="cpu")
    identity = content["identity"]
    torch.save({**content, "identity": {**identity, "data": {"sequence_length": "128"}}}, path)
    with pytest.raises(UserError, match=r"a.ckpt': context_length is \"128\"; it must be a whole number"):
        load_model(path, device="cpu")
    torch.save({**content, "identity": {key: identity[key] for key in ("model", "data")}}, path)
    with pytest.raises(UserError, match=r"a.ckpt' is not a checkpoint of llada fit, or is damaged"):
        load_model(path, device="cpu")


def test_an_arm_without_a_mask_beside_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(training_content(described("arm"), mask_token_id=None), tmp_path / "a.ckpt")
    tokenizer_folder(tmp_path)
    lm = load_model(tmp_path / "a.ckpt", device="cpu")
    assert lm.mask_token_id is None and lm.tokenizer is None
    assert capsys.readouterr().err.startswith(f"warning: '{tmp_path / 'tokenizer.json'}' is not the tokenizer")


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("place", ["zip", "pickle", "meta", "index"])
def test_a_strangers_pickle_is_refused_and_never_run(tmp_path: Path, place: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "step=00000001.ckpt"
    content = training_content(described("arm"))
    hostile = {**content, "hostile": Hostile(victim)}
    if place == "zip":
        torch.save(hostile, path)
    elif place == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Hostile(victim)}))
    else:
        write_shards(path, content)
        if place == "meta":
            torch.save(hostile, path / META)
        else:
            (path / ".metadata").write_bytes(pickle.dumps(Hostile(victim)))
    with pytest.raises(UserError, match=r"is refused: it holds other things|is not a checkpoint of llada fit") as error:
        load_model(path)
    assert len(str(error.value).splitlines()) == 1
    assert not victim.exists()
    assert pickle.loads(pickle.dumps(Hostile(victim))) is None and victim.exists()  # it would have


def test_a_strangers_bytes_among_the_shards_are_not_run(tmp_path: Path) -> None:
    """What is no tensor is read when a run goes on; there, too, it holds plain values only."""
    victim, folder = tmp_path / "victim", tmp_path / "step=00000001.ckpt"
    write_shards(folder, training_content(described("arm")))
    dcp.save({"optimizer_0": {"state": {}, "lr": Hostile(victim)}}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read_sharded(folder)
    assert not victim.exists()


def by_getattr(module: str, kind: str, name: str) -> bytes:
    """A pickle of getattr(kind, name)."""
    return f"cbuiltins\ngetattr\n(c{module}\n{kind}\nV{name}\ntR.".encode()


def test_an_index_names_members_of_its_enums_as_early_python_311_does() -> None:
    written = by_getattr("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", "TORCH_PRESERVE_FORMAT")
    assert pickle.loads(written).name == "TORCH_PRESERVE_FORMAT"  # what Python itself makes of it
    assert _IndexUnpickler(io.BytesIO(written)).load() is pickle.loads(written)


@pytest.mark.parametrize(
    ("module", "kind", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", "__class__"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", "mro"),
        ("torch.distributed.checkpoint.metadata", "Metadata", "__init__"),
        ("torch", "Size", "__reduce__"),
        ("pathlib", "PosixPath", "unlink"),
        ("torch.serialization", "_get_layout", "__globals__"),
        ("os", "path", "join"),
    ],
)
def test_an_index_gets_no_other_attribute(module: str, kind: str, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"members of its own enums only|not a part of an index"):
        _IndexUnpickler(io.BytesIO(by_getattr(module, kind, name))).load()


@pytest.mark.parametrize("spoil", ["cut", "empty", "foreign", "text"])
def test_a_damaged_or_foreign_file(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(training_content(described("arm")), path)
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif spoil == "foreign":
        torch.save({"epoch": 3}, path)
    else:
        path.write_text("" if spoil == "empty" else "text")
    with pytest.raises(UserError, match=r"is not a checkpoint of llada fit, or is damaged; give|is refused"):
        load_model(path)


def test_shards_with_a_file_missing(tmp_path: Path) -> None:
    folder = tmp_path / "step=00000007.ckpt"
    write_shards(folder, training_content(described("arm")))
    for shard in folder.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(UserError, match=r"step=00000007.ckpt"):
        load_model(folder)
