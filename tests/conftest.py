"""Fixtures that several folders share: one small corpus, prepared once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from helpers.small_corpora import write_corpus

# Two threads of torch beside loader workers and ranks on two cores slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The callbacks that kill a run are named by their class paths.
os.environ.setdefault("LLADA_TRUSTED_MODULES", "helpers")
# litdata would ask the package index for its newest version.
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
# An example's deadline is one of wall time, which the other worker shares.
settings.register_profile("suite", deadline=None, max_examples=50)
settings.load_profile("suite")


LONGEST_FIRST = (
    "test_readme.py", "training", "benchmarks", "test_notebooks.py", "test_golden_runs.py", "test_extending.py",
    "experiments", "commands",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin early, so that no worker waits for another's last file."""

    def rank(item: pytest.Item) -> int:
        first = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONGEST_FIRST.index(first) if first in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=rank)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: 512 words, shards of 2048 tokens."""
    from llada_lightning.data.prepare import prepare

    root = tmp_path_factory.mktemp("prepared")
    source = write_corpus(root / "text")
    prepare(str(source), str(root / "data"), vocab_size=384, val_fraction=0.15, shard_tokens=2048, progress=False)
    return root / "data"


@pytest.fixture(scope="session")
def prepared_second(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another corpus with the first one's tokenizer, for mixtures."""
    from llada_lightning.data.prepare import prepare

    root = tmp_path_factory.mktemp("prepared_second")
    source = write_corpus(root / "text", first=1000)
    tokenizer = str(prepared / "tokenizer.json")
    prepare(str(source), str(root / "data"), tokenizer=tokenizer, val_fraction=0.15, shard_tokens=2048, progress=False)
    return root / "data"


@pytest.fixture
def old_python(tmp_path: Path) -> dict[str, str]:
    """The environment in which this Python takes itself for 3.9, of which there is none on most machines."""
    (tmp_path / "sitecustomize.py").write_text(
        "import collections, sys\n"
        "fields = 'major minor micro releaselevel serial'\n"
        "sys.version_info = collections.namedtuple('version_info', fields)(3, 9, 18, 'final', 0)\n"
    )
    return {"PYTHONPATH": str(tmp_path)}
