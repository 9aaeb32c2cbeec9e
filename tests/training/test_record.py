"""What a run says of its validation loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from helpers.tiny_runs import fit, record
from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.training.language_module import LanguageModule
from llada_lightning.training.modules import ArmModule, LladaModule
from llada_lightning.training.record import describe_loss, few_documents, variant


class OfOneRatio(LladaModule):
    """A module of a user: a setting of its own, and all others by keyword."""

    def __init__(self, ratio: float = 0.5, **others: Any) -> None:
        super().__init__(**others)


def resolved(module: LanguageModule, **settings: Any) -> LanguageModule:
    module.identity = {"model": {"init_args": settings}}
    return module


def test_a_run_says_which_variant_of_its_objective_it_is(prepared: Path, tmp_path: Path) -> None:
    short = ("--trainer.max_steps=2", "--model.seed=7", "--model.rope_theta=500000")
    assert record(fit("arm", prepared, tmp_path / "a", *short))["variant"] == "rope_theta=500000"
    assert record(fit("llada", prepared, tmp_path / "b", "--trainer.max_steps=2"))["variant"] is None
    changed = ("--model.optimizer.weight_decay=0", "--model.compat=llada", "--data.mask_eps=0.01")
    folder = fit("llada", prepared, tmp_path / "c", "--trainer.max_steps=2", *changed)
    assert record(folder)["variant"] == "compat=llada;mask_eps=0.01;optimizer.weight_decay=0"


def test_the_module_and_its_own_settings_are_part_of_the_variant(prepared: Path) -> None:
    data = TokenDataModule(path=str(prepared), sequence_length=32)
    name = f"{OfOneRatio.__module__}.OfOneRatio"
    arm, llada = ArmModule(shape="107k"), OfOneRatio(shape="107k")
    assert variant(resolved(arm, shape="443k", seed=3, optimizer={"betas": [0.9, 0.95], "eps": 1e-8}), data) is None
    assert variant(resolved(llada, ratio=0.5, norm_eps=1e-5, compat=None), data) == f"module={name}"
    assert variant(resolved(llada, ratio=0.25, optimizer={"betas": [0.9, 0.99]}), data) == (
        f"module={name};optimizer.betas=[0.9,0.99];ratio=0.25"
    )


def test_an_error_that_is_not_known_is_no_number() -> None:
    values: dict[str, float | None] = {"val_nats_per_token": 4.5, "val_stderr": math.nan, "val_bits_per_byte": None}
    assert describe_loss(values, "bound") == "4.5000 ± n/a nats/token (bound)"
    assert describe_loss({**values, "val_stderr": 0.25}, "exact") == "4.5000 ± 0.2500 nats/token (exact)"


def test_the_remedy_for_few_documents_is_one_that_the_data_have() -> None:
    assert few_documents(0) is None and few_documents(1_000) is None
    assert str(few_documents(1)).startswith("note: validation sequences begin in 1 document only")
    assert str(few_documents(3)).endswith("give more text, or prepare it with a larger --val-fraction")
    assert few_documents(2, of_dialogues=True) == (
        "note: 2 validation dialogues only, so the standard error means little; give more rows, or a larger "
        "--data.val_fraction"
    )
