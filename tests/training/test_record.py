"""What a run says of its validation loss."""

from __future__ import annotations

import math

from llada_lightning.training.record import describe_loss, few_documents


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
