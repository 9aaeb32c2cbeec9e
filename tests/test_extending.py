"""The examples of docs/extending.md: each module is written to a file, and the commands run in their order."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llada_lightning.commands.main import main
from llada_lightning.compute import rules
from llada_lightning.data import corpora
from llada_lightning.generation import reveal
from llada_lightning.objectives import OBJECTIVES, densities, register
from llada_lightning.support.errors import UserError

ROOT = Path(__file__).parents[1]
PARTS = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
MODULES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", "".join(PARTS), re.DOTALL | re.MULTILINE))
TABLES = (
    OBJECTIVES, corpora.SOURCES, reveal.RULES, rules.LEARNING_RATE_RULES, rules.BATCH_RULES, rules.WARMUP_RULES,
    densities.DENSITIES,
)  # fmt: skip


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path) -> Iterator[Path]:
    """A folder with the modules and the data of the page; afterwards the tables are as they were."""
    kept = [dict(table) for table in TABLES]
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tour").symlink_to(prepared)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for table, rows in zip(TABLES, kept, strict=True):
        table.clear()
        table.update(rows)  # type: ignore[arg-type]
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_examples_run(modules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = {}
    for part in PARTS:
        for block in re.findall(r"^```bash\n(.*?)^```", part, re.DOTALL | re.MULTILINE):
            for line in block.strip().splitlines():
                if line.startswith("export "):
                    name, _, value = line.removeprefix("export ").partition("=")
                    if name == "PYTHONPATH":  # the fits of the sweep find the modules, and this package, by it
                        value = os.pathsep.join([str(modules), *filter(None, [os.environ.get(name)])])
                    monkeypatch.setenv(name, value)
                    continue
                assert main(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
                printed[line.split("--study")[0]] = capsys.readouterr().out
    assert set(os.environ["LLADA_PLUGINS"].split(",")) == set(MODULES)

    [record] = json.loads(Path("runs/mine/clipped/result.json").read_text())
    assert (record["objective"], record["val_kind"], record["status"]) == ("clipped", "bound", "done")
    planned = yaml.safe_load(Path("runs/mine.yaml").read_text())["parameters"]["config"]["values"]
    assert any("my_objective.ClippedModule" in config for config in planned)
    assert json.loads(Path("data/squares/manifest.json").read_text())["source"]["kind"] == "squares"
    answer = json.loads(next(out for line, out in printed.items() if "right_to_left" in line))
    [steps] = answer["step_of_token"]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == 8
    rate = yaml.safe_load(Path("runs/mine/rate/config.yaml").read_text())["model"]["init_args"]["schedule"]["lr"]
    [falling] = json.loads(Path("runs/mine/falling/result.json").read_text())
    assert falling["variant"] == "density=my_density.Falling(slope=0.8)" and falling["val_kind"] == "bound"
    assert "train_nats_per_token" in Path("runs/mine/falling/metrics.csv").read_text().splitlines()[0]
    [record] = json.loads(Path("runs/mine/rate/result.json").read_text())
    assert rate == pytest.approx(record["params_nonembedding"] ** -0.5, rel=5e-3)


def test_a_name_that_a_table_has_is_refused(modules: Path) -> None:
    kept = [dict(table) for table in TABLES]
    for name in ("igsm", "hf"):
        with pytest.raises(UserError, match=f"source: the prefix '{name}' has a source already"):
            corpora.register(name, lambda source: corpora.open_corpus("python-stdlib"))
    with pytest.raises(UserError, match="objective: 'arm' is in the table already"):
        register(replace(OBJECTIVES["arm"], label="mine"))
    with pytest.raises(UserError, match="reveal rule 'margin': there is another one"):
        reveal.register("margin", reveal.Rule(choice=reveal.random_count))
    for setting, name in (("lr", "kaplan"), ("batch", "lone"), ("warmup", "study")):
        with pytest.raises(
            UserError, match=rf"^rules\.{setting}: there is another rule '{name}'; choose another name$"
        ):
            rules.register(setting, name, lambda size: 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^rules: 'decay' has no table of rules; choose from lr, batch, warmup$"):
        rules.register("decay", "mine", lambda size: 1)  # type: ignore[arg-type]
    assert [dict(table) for table in TABLES] == kept


def test_rules_of_every_setting_are_registered_and_then_known(modules: Path) -> None:
    rule = rules.LEARNING_RATE_RULES["kaplan"]
    for setting, table in (
        ("lr", rules.LEARNING_RATE_RULES),
        ("batch", rules.BATCH_RULES),
        ("warmup", rules.WARMUP_RULES),
    ):
        for _ in range(2):  # the same again is no other one
            rules.register(setting, "mine", rule)  # type: ignore[arg-type]
        assert table["mine"] is rule  # type: ignore[index]
        rules.Rules(**{setting: "mine"}).check()
