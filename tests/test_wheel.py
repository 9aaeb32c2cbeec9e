"""The package as others install it: a wheel in an empty environment, used outside of the clone."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from llada_lightning.study.results import read_results

ROOT = Path(__file__).parents[1]
SOURCES = ("llada_lightning", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "llada_lightning").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it alone."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "clone").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "clone" / name)
    done = python("build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "clone"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def llada(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment that holds the wheel, and sees the dependencies of this one."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    (wheel,) = built.glob("*.whl")
    own = environment / "bin" / "python"
    arguments = ("--python", str(own), "install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel))
    done = python("pip", *arguments)
    assert done.returncode == 0, done.stderr
    (folder,) = environment.glob("lib/python3*/site-packages")
    # Paths behind its own folder, whose .pth files are not read: the package itself is the wheel's.
    (folder / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return environment / "bin" / "llada"


def run(llada: Path, folder: Path, line: str) -> str:
    """What a command prints, in a folder outside of the clone."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([llada, *line.split()], cwd=folder, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_distributions_are_fit_for_an_index(built: Path) -> None:
    checked = python("twine", "check", "--strict", *map(str, built.iterdir()))
    assert checked.returncode == 0 and checked.stdout.count("PASSED") == 2, checked.stdout


def test_the_wheel_holds_the_whole_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == PACKAGE
    tables = ("table18.csv", "table19.csv", "published_isoflop.csv", "README.md")
    for data in (
        "py.typed", "compute/measured_speeds.csv", "evaluation/tasks/igsm.yaml", "study/sweep/quickstart.yaml",
        *(f"study/reference/{table}" for table in tables),
    ):  # fmt: skip
        assert f"llada_lightning/{data}" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    (sources,) = built.glob("*.tar.gz")
    with tarfile.open(sources) as archive:
        assert not any("/tests/" in name for name in archive.getnames())


def test_an_old_python_does_not_take_the_wheel(built: Path, old_python: dict[str, str]) -> None:
    (wheel,) = built.glob("*.whl")
    refused = python("pip", "install", "--dry-run", "--no-deps", "--no-index", str(wheel), **old_python)
    assert refused.returncode == 1
    assert "'llada-lightning' requires a different Python: 3.9.18 not in '>=3.10'" in refused.stderr


def test_the_command_of_the_wheel_needs_no_clone(llada: Path, tmp_path: Path) -> None:
    assert run(llada, tmp_path, "--help").startswith("usage: llada COMMAND")
    planned = json.loads(run(llada, tmp_path, "plan --paper --json"))
    assert len(planned["rows"]) > 10
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_default_study_of_the_wheel_in_small(llada: Path, tmp_path: Path) -> None:
    options = "--vocab-size 512 --max-bytes 1000000 --val-fraction 0.2"
    run(llada, tmp_path, f"prepare --source python-stdlib --out data/quickstart {options}")
    run(llada, tmp_path, "sweep run quickstart --jobs 2 -- --budget.flops=6e9 --data.val_sequences=16")
    run(llada, tmp_path, "collect runs/quickstart --out runs/quickstart/results.csv")
    run(llada, tmp_path, "curves runs/quickstart/results.csv --out runs/quickstart")
    study = tmp_path / "runs" / "quickstart"
    assert len(read_results(study / "results.csv")) == 17  # a run for each line of the sweep
    assert (study / "scaling.png").exists()
    (of_the_wheel,) = llada.parents[1].glob("lib/python3*/site-packages/llada_lightning/study/sweep/quickstart.yaml")
    assert (study / "quickstart.sweep.yaml").read_bytes() == of_the_wheel.read_bytes()
