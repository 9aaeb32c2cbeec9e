"""`llada convert --push`: what arrives at the Hub, byte for byte, and each way in which an upload fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from helpers.hub_standin import TOKEN, Hub, hub_standin
from helpers.small_checkpoints import GOLDEN, tokenizer_folder, written
from llada_lightning.commands.main import main

Refused = Callable[..., str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in of the Hub that this process takes for the Hub, and a user who has logged in."""
    with hub_standin() as standin:
        monkeypatch.setattr(constants, "ENDPOINT", standin.address)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield standin


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Converts with ``--push``, which fails; returns the one line of the error."""

    def run(*options: str) -> str:
        assert main(["convert", str(GOLDEN), str(tmp_path / "out"), *options]) == 2
        printed = capsys.readouterr()
        assert TOKEN not in printed.out + printed.err
        *notes, error = printed.err.splitlines()
        assert all(note.startswith("note: ") for note in notes)
        return error

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_file_arrives_byte_for_byte(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "arm", "llada", "arm", tokenizer_folder(tmp_path / "tokenizer"))
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--to=hf-llama", "--push=someone/a-model", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["pushed"] == f"{hub.address}/someone/a-model/commit/{'0' * 40}"
    assert TOKEN not in printed.out + printed.err
    assert "states no licence and does not describe the training data; add both" in printed.err
    assert hub.files == {"someone/a-model": contents(out)}
    assert hub.messages == ["Upload a model of llada-lightning"]
    assert hub.repositories["someone/a-model"].get("visibility") is None


def test_weights_go_through_the_storage_of_large_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.large = (".safetensors", "tokenizer.json")
    out = tmp_path / "out"
    arguments = ["--max-shard-size=300KB", "--push=someone/large", "--private"]
    assert main(["convert", str(GOLDEN), str(out), *arguments]) == 0
    assert hub.files["someone/large"] == contents(out)
    assert len(hub.objects) == 4 and {len(each) for each in hub.objects.values()} == {
        path.stat().st_size for path in out.glob("*.safetensors")
    }
    assert hub.repositories["someone/large"]["visibility"] == "private"
    assert "someone/large" in " ".join(capsys.readouterr().out.split())


def test_the_environment_names_the_hub_and_the_token(tmp_path: Path) -> None:
    """As a user starts it, with nothing of the library replaced."""
    with hub_standin() as hub:
        others = {
            name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        }
        environment = {**others, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "llada_lightning", "convert", str(GOLDEN), "out", "--push=someone/a-model"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert hub.files["someone/a-model"] == contents(tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "user/", "/model", "user/a model", "user/a--b", "u/x.git", "../x", "-x/y", "x/y-", ""]
)
def test_a_name_that_is_none_is_refused_before_anything_is_converted(
    hub: Hub, refused: Refused, tmp_path: Path, name: str
) -> None:
    error = refused(f"--push={name}")
    assert error.startswith(f"error: --push: '{name}'") and "give USER/NAME" in error
    assert hub.requests == [] and not (tmp_path / "out").exists()


def test_a_name_that_looks_like_an_option_is_told_how_to_be_written(refused: Refused, hub: Hub, tmp_path: Path) -> None:
    error = refused("--push", "-x/y")
    assert error.startswith("error: --push: it has no value; a value that begins with '-' is written --push=VALUE; see")
    assert hub.requests == [] and not (tmp_path / "out").exists()


def test_no_token_is_told_before_anything_is_converted(
    hub: Hub, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    error = refused("--push=someone/a-model")
    assert "no token of the Hugging Face Hub was found; log in with: hf auth login, or set HF_TOKEN" in error
    assert hub.requests == [] and not (tmp_path / "out").exists()


def test_a_machine_that_is_kept_offline(
    hub: Hub, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE keeps this machine from the Hub; unset it" in refused("--push=someone/a-model")
    assert not (tmp_path / "out").exists()


def test_private_without_push(refused: Refused, tmp_path: Path) -> None:
    assert refused("--private") == "error: --private: nothing is uploaded; add --push USER/NAME"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("request_name", "status", "said", "told"),
    [
        ("create", 401, "Invalid username or password.", "the Hub refuses the token (401); log in with: hf auth login"),
        (
            "create",
            403,
            "You don't have the rights",
            "may not write there (403: You don't have the rights); take a token",
        ),
        ("preupload", 403, "read only", "may not write there (403: read only); take a token with write access"),
        ("create", 404, "", "no such user, organization or repository for this token (404); correct USER/NAME"),
        ("commit", 400, "too large", "the Hub refuses the upload (400: too large)"),
        ("commit", 422, "out of order", "the Hub refuses the upload (422: out of order)"),
    ],
)
def test_what_the_hub_refuses(
    hub: Hub, refused: Refused, tmp_path: Path, request_name: str, status: int, said: str, told: str
) -> None:
    hub.refused[request_name] = (status, said)
    error = refused("--push=someone/a-model", "--private")
    out = tmp_path / "out"
    assert error.startswith("error: --push someone/a-model: ") and told in error, error
    again = f"'{out}' is complete and kept; upload it with: hf upload someone/a-model {out} . --private"
    assert error.endswith(again)
    assert "model.safetensors" in contents(out) and hub.files == {}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("hf_ofAnother", "the Hub refuses the token (401); log in with: hf auth login, or set HF_TOKEN to a token"),
        ("hf_wr\u00f6ng", "cannot be reached"),  # it cannot even be sent
    ],
)
def test_a_token_that_is_refused_is_not_shown(
    hub: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch, wrong: str, told: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", wrong)
    error = refused("--push=someone/a-model")
    assert told in error and wrong not in error
    assert "is complete and kept; upload it with: hf upload someone/a-model " in error


def test_no_network(refused: Refused, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # a port at which nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        error = refused("--push=someone/a-model")
    assert "the Hub cannot be reached (" in error and "check the network, and HF_ENDPOINT if it is set" in error
    assert error.endswith(" .")
