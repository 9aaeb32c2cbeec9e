"""What a stranger hands over - a checkpoint, prepared data, a configuration - is read, and nothing in it is run.

The pickles here would make a folder where they are unpickled; `load_model` has tests of its own beside it.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn

import llada_lightning
from helpers.small_checkpoints import write_shards
from helpers.tiny_runs import fit, fit_arguments, fit_process
from llada_lightning.checkpoints.sharded_checkpoints import META
from llada_lightning.commands.main import main
from llada_lightning.records import CONFIG_FILE
from llada_lightning.support.errors import UserError
from llada_lightning.support.security import redacted, refuse_secrets
from llada_lightning.training.parallel import FullySharded

SHORT = ("--trainer.max_steps=4", "--run.checkpoint_every_steps=2")
PACKAGE = Path(llada_lightning.__file__).parent


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("llada", prepared, tmp_path_factory.mktemp("trained"), *SHORT)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    return tmp_path / "victim"


@pytest.fixture
def refused(victim: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused in one line, without running what it was handed."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        assert not victim.exists(), "it was run"
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
        return lines[-1]

    return run


def spoil(checkpoint: Path, place: str, victim: Path) -> None:
    """Put a hostile pickle into a checkpoint: into the file, or into a part of its form in shards."""
    content = torch.load(checkpoint, weights_only=True)
    if place == "file":
        torch.save({**content, "hostile": Hostile(victim)}, checkpoint)
        return
    if place == "pickle":
        checkpoint.write_bytes(pickle.dumps({**content, "state_dict": Hostile(victim)}))
        return
    checkpoint.unlink()
    write_shards(checkpoint, content)
    if place == "meta":
        torch.save({**torch.load(checkpoint / META), "hostile": Hostile(victim)}, checkpoint / META)
    else:
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Hostile(victim)))


@pytest.mark.parametrize("place", ["file", "pickle", "meta", "index"])
def test_a_planted_checkpoint_is_read_by_no_command(
    trained: Path,
    prepared: Path,
    tmp_path: Path,
    victim: Path,
    place: str,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By name it is refused; in a run's own folder, too, or where it is no archive passed over as a damaged one."""
    root = tmp_path / "runs"
    shutil.copytree(trained.parents[1], root)
    folder = root / "test" / "run"
    checkpoint = folder / "checkpoints" / "step=00000004.ckpt"
    spoil(checkpoint, place, victim)
    (folder / "result.json").unlink()
    fit_again = fit_arguments("llada", prepared, root, *SHORT)
    other = [*fit_arguments("llada", prepared, tmp_path / "other", *SHORT), f"--ckpt_path={checkpoint}"]
    commands = [other]
    if place in ("file", "index"):
        commands.append([*other, "--weights_only=false"])  # Lightning's own switch
        for verb in ("validate", "test", "predict"):
            commands.append([verb, f"--config={folder / CONFIG_FILE}", f"--ckpt_path={checkpoint}"])
        commands.append(["generate", str(checkpoint), "--prompt", "1 plus"])
        commands.append(["score", str(folder), "--text", str(folder / CONFIG_FILE)])
        commands.append(["convert", str(folder), str(tmp_path / "out"), "--to", "llada"])
    for command in commands:
        assert "checkpoint" in refused(*command), command
    if place in ("file", "meta"):
        assert "checkpoint" in refused(*fit_again)
    else:
        assert main(fit_again) == 0
        assert "step=00000004.ckpt is damaged" in capsys.readouterr().err
        assert not victim.exists()


@pytest.mark.parametrize("place", ["value", "index", "meta"])
def test_a_sharded_run_goes_on_without_running_its_shards(tmp_path: Path, victim: Path, place: str) -> None:
    """The library's own reader runs the index, and whatever in the shards is no tensor."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    groups = [{**{k: v for k, v in optimizer.param_groups[0].items() if k != "params"}, "params": names}]
    if place == "value":
        groups[0]["lr"] = Hostile(victim)
    content = {"state_dict": model.state_dict(), "optimizer_0": {"state": state, "param_groups": groups}}
    dcp.save(content, checkpoint_id=tmp_path / "shards", no_dist=True)
    torch.save({"step": Hostile(victim) if place == "meta" else 1}, tmp_path / "shards" / META)
    if place == "index":
        (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(Hostile(victim)))
    strategy = FullySharded()
    strategy._model, strategy.broadcast = model, lambda value, src=0: value  # type: ignore[method-assign]
    strategy.optimizers = [optimizer]
    with pytest.raises(UserError, match=r"is refused|is damaged"):
        strategy.load_checkpoint(tmp_path / "shards", weights_only=False)
    assert not victim.exists()


def test_pickled_shards_of_data_are_not_run(prepared: Path, tmp_path: Path, victim: Path) -> None:
    """litdata can hold any object as a pickle; the index says what a shard holds."""
    for number, form in enumerate(("pickle", "pickle:0", None)):
        data = tmp_path / str(number)
        shutil.copytree(prepared, data)
        index = json.loads((data / "train" / "index.json").read_text())
        index["config"]["data_format"] = [form] if form else index["config"]["data_format"]
        (data / "train" / "index.json").write_text(json.dumps(index))
        payload = pickle.dumps(Hostile(victim))
        for shard in (data / "train").glob("*.bin"):
            shard.write_bytes(payload.ljust(shard.stat().st_size, b"\0"))
        with suppress(ValueError, KeyError, AssertionError):  # of litdata, where only the index is wrong
            assert main(fit_arguments("arm", data, tmp_path / "runs", *SHORT)) == 2
        assert not victim.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "train/index.json"])
def test_a_pickle_in_the_place_of_a_data_file_is_not_run(
    prepared: Path, tmp_path: Path, victim: Path, name: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    (data / name).write_bytes(pickle.dumps(Hostile(victim)))
    with suppress(ValueError):
        assert main(fit_arguments("arm", data, tmp_path / "runs", *SHORT)) == 2
    assert not victim.exists()
    pickle.loads((data / name).read_bytes())
    assert victim.exists()  # it would have


def hostile_yaml(victim: Path) -> str:
    return f"!!python/object/apply:os.mkdir [{victim}]"


def test_hostile_yaml_is_refused_by_every_command_that_reads_yaml(
    tmp_path: Path, victim: Path, prepared: Path, refused: Callable[..., str]
) -> None:
    for number, text in enumerate([hostile_yaml(victim), f"trainer: {hostile_yaml(victim)}\n"]):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        for verb in ("fit", "validate"):
            refused(verb, f"--config={path}")
        refused("fit", f"--config={text.strip()}")
        refused("sweep", "show", str(path))
        refused("sweep", "run", str(path))
        refused("plan", "--flops", "1e15", "--base", str(path), "--data", str(prepared), "--out", str(tmp_path / "o"))
    refused(*fit_arguments("arm", prepared, tmp_path, f"--model.shape={hostile_yaml(victim)}"))
    refused(*fit_arguments("arm", prepared, tmp_path, f"--trainer.callbacks={hostile_yaml(victim)}"))


def test_hostile_yaml_in_a_runs_folder_is_not_run(
    trained: Path, tmp_path: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study" / "run"
    shutil.copytree(trained, folder)
    (folder / CONFIG_FILE).write_text(hostile_yaml(victim))
    main(["collect", str(folder.parent), "--out", str(tmp_path / "results.csv")])
    main(["generate", str(folder), "--prompt", "1 plus", "--length", "4", "--steps", "2", "--device", "cpu"])
    assert not victim.exists()
    assert "Traceback" not in capsys.readouterr().err
    yaml.unsafe_load((folder / CONFIG_FILE).read_text())
    assert victim.exists()  # it would have


# --- class paths -----------------------------------------------------------------------------------------------------


@pytest.fixture
def strange(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module on the path that makes a folder when it is imported."""
    name = f"strange_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(
        f"import os\nos.mkdir({str(victim)!r})\nfrom lightning import Callback\nclass Thing(Callback): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


NAMED = {
    "model": "--model={}",
    "callbacks": "--trainer.callbacks=[{{class_path: {}}}]",
    "logger": "--trainer.logger={}",
    "strategy": "--trainer.strategy={{class_path: {}}}",
    "strategy by its name": "--trainer.strategy={}",
    "nested": "--trainer.callbacks=[{{class_path: lightning.pytorch.callbacks.LambdaCallback, "
    "init_args: {{on_fit_start: {}}}}}]",
    "inline": "--config={{trainer: {{callbacks: [{{class_path: {}}}]}}}}",
}


@pytest.mark.parametrize("argument", NAMED.values(), ids=NAMED.keys())
def test_a_strangers_class_is_not_even_imported(
    prepared: Path, tmp_path: Path, strange: str, argument: str, refused: Callable[..., str]
) -> None:
    line = refused(*fit_arguments("arm", prepared, tmp_path / "runs", *SHORT), argument.format(f"{strange}.Thing"))
    assert strange not in sys.modules
    assert f"'{strange}.Thing' is not of llada_lightning, lightning or torch" in line
    assert line.endswith(f"if you trust it, set LLADA_TRUSTED_MODULES={strange}")


def test_nor_is_one_in_a_file(prepared: Path, tmp_path: Path, strange: str, refused: Callable[..., str]) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(f"trainer:\n  callbacks:\n  - class_path: {strange}.Thing\n")
    words = fit_arguments("arm", prepared, tmp_path / "runs", *SHORT)[1:]
    refused("fit", f"--config={path}", *words)
    refused("validate", f"--config={path}")
    sweep = {"method": "grid", "command": ["llada", "fit", f"--config={path}", *words, "${args}"]}
    (tmp_path / "sweep.yaml").write_text(json.dumps({**sweep, "parameters": {"seed_everything": {"value": 1}}}))
    refused("sweep", "show", str(tmp_path / "sweep.yaml"))
    refused("launch", "--launcher", "true", "--", "fit", f"--config={path}", *words)
    assert strange not in sys.modules


@pytest.mark.parametrize(
    "path",
    ["os.system", "torch.os.system", "torch.hub.load", "torch.utils.cpp_extension.load", "jsonargparse.CLI"],
)
def test_what_runs_commands_cannot_be_named(
    prepared: Path, tmp_path: Path, path: str, refused: Callable[..., str]
) -> None:
    line = refused(*fit_arguments("arm", prepared, tmp_path / "runs", *SHORT), NAMED["nested"].format(path))
    assert "was not imported" in line


def test_a_value_of_no_declared_type_is_not_built(prepared: Path, tmp_path: Path, victim: Path) -> None:
    """DDP's further arguments have no types: the parser would build what a `class_path` among them names."""
    inner = f"{{class_path: subprocess.Popen, init_args: {{args: [mkdir, {victim}]}}}}"
    strategy = f"{{class_path: lightning.pytorch.strategies.DDPStrategy, dict_kwargs: {{static_graph: {inner}}}}}"
    assert main([*fit_arguments("arm", prepared, tmp_path / "runs", *SHORT), f"--trainer.strategy={strategy}"]) == 2
    assert not victim.exists()


def test_a_module_that_the_user_trusts_is_imported(
    prepared: Path, tmp_path: Path, strange: str, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLADA_TRUSTED_MODULES", f"helpers, {strange}")
    fit("arm", prepared, tmp_path / "runs", *SHORT, NAMED["callbacks"].format(f"{strange}.Thing"))
    assert victim.exists()


@pytest.mark.parametrize("name", ["no-name", "*", "jsonargparse", "a..b"])
def test_only_names_of_modules_can_be_trusted(
    name: str, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setenv("LLADA_TRUSTED_MODULES", name)
    assert "is not the name of a module of yours" in refused("fit", "--model=ArmModule")


def test_no_call_of_the_package_runs_what_it_reads() -> None:
    """No unsafe loader, no remote code, no shell, anywhere."""
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    forbidden |= {"os.system", "os.popen", "pd.read_pickle", "joblib.load", "torch.hub.load"}
    found = []
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            unsafe = name in forbidden
            unsafe |= name == "torch.load" and keywords.get("weights_only") != "True"
            unsafe |= bool({"trust_remote_code", "allow_pickle", "shell"} & keywords.keys())
            # The one place that runs what a model wrote: within the sandbox, in a process that never is this one.
            sandboxed = name == "exec" and path == PACKAGE / "evaluation" / "sandboxed.py"
            if unsafe and not sandboxed:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert not found


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRET = "s3cr3t0123456789s3cr3t0123456789s3cr3t01"
ADDRESSES = [
    f"s3://KEY:{SECRET}@bucket/data",
    f"https://user:{SECRET}@host/data",
    f"https://host/data?token={SECRET}",
    f"https://host/data?a=1&X-Amz-Signature={SECRET}",
    f"gs://bucket/data?access_token={SECRET}#part",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_secret_in_an_address_is_found_and_left_out(address: str) -> None:
    assert SECRET not in redacted(f"cannot read '{address}' ({address}); give another")
    for value in (address, {address: 1.0}, [{"path": address}]):
        with pytest.raises(UserError, match=r"^data[.\w]+: the address holds a password or a token") as error:
            refuse_secrets({"data": {"workers": 2, "path": value}})
        assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "address", ["s3://bucket/a@b:c", "https://user@host/x?page=3", "a:b@c", "hf:org/name?split=train"]
)
def test_an_address_without_one_is_left_alone(address: str) -> None:
    assert redacted(address) == address
    refuse_secrets({"data": {"path": address}})


def test_no_command_line_or_file_puts_a_secret_into_a_runs_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    address = ADDRESSES[0]
    path = tmp_path / "given.yaml"
    path.write_text(f"data:\n  class_path: TokenDataModule\n  init_args:\n    path: {json.dumps(address)}\n")
    common = ("fit", "--model=ArmModule", f"--run.root={tmp_path}", "--budget.flops=1e9")
    for words in ([f"--data.path={address}"], [f"--config={path}"], [f"--data.path={{{json.dumps(address)}: 1.0}}"]):
        line = refused(*common, *words)
        assert line.startswith("error: data.init_args.path: the address holds") and SECRET not in line
    for words in ([f"--data.path={address}", "--data.workers=many"], [f"--data.workers={address}"]):
        assert SECRET not in refused(*common, *words)  # the parser's words
    assert [p.name for p in tmp_path.iterdir()] == ["given.yaml"]


def test_keys_of_the_environment_are_in_nothing_that_a_run_writes_or_says(prepared: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"), SECRET)
    offline = ("--wandb.project=test", "--wandb.offline=true")
    done = fit_process("arm", prepared, tmp_path, *SHORT, *offline, variables=secrets)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.csv", "result.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
