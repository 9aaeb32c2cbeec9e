"""A rule file comes back as it was written, plans by its laws, and is refused where it does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llada_lightning.compute.rules import Range, Size
from llada_lightning.study.plan import Grid, Recipe, Stream, plan_study
from llada_lightning.study.rule_file import FittedRules, Law, RuleFile, read_rule_file, write_rule_file
from llada_lightning.support.errors import UserError

LR = Law("flops", 2e-3, -0.1, 1e12, (1e-3, 4e-3), (-0.2, 0.0))
BATCH = Law("tokens", 1024.0, 0.5, 1e6, (512.0, 2048.0), (0.3, 0.7))
RULES = RuleFile(
    objectives={
        "arm": FittedRules(LR, BATCH, Range(flops=(1e12, 4e12)), ({"flops": 1e12},)),
        "llada": FittedRules(replace(LR, a=5e-4), None, Range(flops=(1e12, 4e12))),
    },
    vocab_size=512,
    sequence_length=64,
    tokenizer="abc",
    data_fingerprint=None,
    table="results.csv",
    table_sha256="0",
    package="0.1.0",
)
STREAM = Stream(512, 64, random_length_share=0.0)
GRID = Grid(shapes=["107k", "214k", "443k"])


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_rule_file(tmp_path / "rules.json", RULES)
    assert read_rule_file(str(tmp_path / "rules.json")) == RULES


def test_a_law_is_a_power_of_its_variable() -> None:
    assert LR(Size(1e5, 1e9, 1e14)) == pytest.approx(2e-3 * 100**-0.1)
    assert BATCH(Size(1e5, 4e6, 1e14)) == pytest.approx(2048)


def test_a_plan_takes_rate_and_batch_of_each_objective_from_its_laws() -> None:
    """By hand: at 1e12 FLOPs rates are the laws' a; 107k reads 1.56e6 tokens: 1024 sqrt(1.56) = 1279 a batch."""
    plan = plan_study([1e12], STREAM, grid=GRID, recipe=Recipe(fitted=RULES.objectives))
    table = plan.table().set_index(["objective", "shape"])
    assert set(table.loc["arm"].lr) == {2e-3}
    assert set(table.loc["llada"].lr) == {5e-4}
    assert table.loc[("arm", "107k")].global_batch == 16  # 20 sequences to a power of two
    by_rule = plan_study([1e12], STREAM, grid=GRID).table().set_index(["objective", "shape"])
    assert table.loc["llada"].global_batch.equals(by_rule.loc["llada"].global_batch)
    numbers = plan_study([1e12], STREAM, grid=GRID, recipe=Recipe(fitted=RULES.objectives, lr=0.01, batch=8)).table()
    assert (set(numbers.lr), set(numbers.global_batch)) == ({0.01}, {8})


def test_a_trunk_follows_the_laws_at_the_geometric_mean_of_its_budgets() -> None:
    plan = plan_study([1e12, 4e12], STREAM, grid=GRID, recipe=Recipe(fitted=RULES.objectives, batch=16))
    assert {trunk.lr for trunk in plan.trunks if trunk.objective == "arm"} == {0.00187}  # 2e-3 x 2^-0.1


def test_beyond_the_budgets_it_was_fitted_on_a_plan_says_by_how_much() -> None:
    inside, beyond = (
        plan_study([flops], STREAM, grid=GRID, objectives=["arm"], recipe=Recipe(fitted=RULES.objectives)).warnings()
        for flops in (2e12, 4e13)
    )
    assert not any("rules were fitted on" in note for note in inside)
    (note,) = (note for note in beyond if "rules were fitted on" in note)
    assert "the rule file's arm at 4e+13 FLOPs, 10 times above 1e+12 to 4e+12" in note


def test_with_a_rule_file_no_factor_on_the_rate_is_advised() -> None:
    plan = plan_study([1e12], STREAM, grid=GRID, recipe=Recipe(fitted=RULES.objectives))
    assert not any("--lr-scale-llada" in note for note in plan.warnings())


@pytest.mark.parametrize(
    ("objectives", "vocab_size", "length", "words"),
    [
        (["arm"], 4096, 64, "was measured with 512 vocabulary entries, and the plan has 4096"),
        (["arm"], 512, 256, "was measured at sequence length 64, and the plan has 256; give --sequence-length 64"),
        (["arm", "iid"], 512, 64, r"was measured for arm, llada, and not for iid; tune it too"),
    ],
)
def test_rules_that_were_measured_for_something_else_are_refused(
    objectives: list[str], vocab_size: int, length: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        RULES.check("rules.json", objectives, vocab_size, length)
    RULES.check("rules.json", ["arm"], 512, 64)


def test_rules_of_the_only_variant_serve_for_its_objective() -> None:
    easy = "llada [loss_weight=ce]"
    of_llada = RULES.objectives["llada"]
    one = replace(RULES, objectives={easy: of_llada})
    assert one.name_of("llada") == easy and one.name_of("arm") is None
    one.check("rules.json", ["llada"], 512, 64)
    two = replace(RULES, objectives={easy: of_llada, "llada [loss_weight=clipped]": of_llada})
    assert two.name_of("llada") is None
    with pytest.raises(UserError, match=r"was measured for llada \[loss_weight=ce\], .*, and not for llada"):
        two.check("rules.json", ["llada"], 512, 64)
    assert replace(RULES, objectives={**RULES.objectives, easy: of_llada}).name_of("llada") == "llada"


def test_rules_of_another_tokenizer_are_refused() -> None:
    own = replace(RULES, tokenizer="1f")
    with pytest.raises(UserError, match="was measured with another tokenizer than that of the plan's data"):
        own.check("rules.json", ["arm"], 512, 64, "2e")
    own.check("rules.json", ["arm"], 512, 64, "1f")
    own.check("rules.json", ["arm"], 512, 64)  # where no data is known
    replace(own, tokenizer=None).check("rules.json", ["arm"], 512, 64, "2e")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "something"}, "is no rule file; give one that `llada curves --rules` wrote"),
        ({"version": 2}, "is a rule file of version 2, and this package reads version 1"),
        ({"objectives": {}}, "is damaged"),
        ({"objectives": {"arm": {}}}, "is damaged"),
        ({"objectives": {"arm": 3}}, "is damaged"),
        ({"objectives": None}, "is damaged"),
        ({"vocab_size": "many"}, "is damaged"),
    ],
)
def test_a_file_that_is_none_or_is_damaged_is_refused_in_one_line(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "rules.json"
    write_rule_file(path, RULES)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as error:
        read_rule_file(str(path))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, "fast", -1.0, 0.0])
def test_a_law_without_a_positive_number_is_refused(value: object, tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    write_rule_file(path, RULES)
    content = json.loads(path.read_text())
    content["objectives"]["arm"]["lr"]["a"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is damaged"):
        read_rule_file(str(path))


def test_a_missing_file_and_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_rule_file(str(tmp_path / "nowhere.json"))
    (tmp_path / "text.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="is no rule file"):
        read_rule_file(str(tmp_path / "text.json"))
