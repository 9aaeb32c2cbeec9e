"""What a plan is told of prepared data."""

from __future__ import annotations

from pathlib import Path

import pytest

from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.data.manifest import read_data_facts
from llada_lightning.run import Stream
from llada_lightning.support.errors import UserError


def test_epochs_are_those_of_the_data_module(prepared: Path, prepared_second: Path) -> None:
    mixture = {str(prepared): 3.0, str(prepared_second): 1.0}
    facts = read_data_facts(mixture, 32)
    data = TokenDataModule(path=mixture, sequence_length=32, global_batch=8)
    assert facts.vocab_size == data.tokenizer.vocab_size
    epochs = Stream(facts.vocab_size, 32, sources=facts.sources).epochs(500 * 8)
    assert epochs == pytest.approx(data.epochs(500), rel=0.01)  # whole sequences there, expected ones here


def test_sequences_longer_than_a_shard_are_refused(prepared: Path) -> None:
    with pytest.raises(UserError, match="longer than every shard"):
        read_data_facts(str(prepared), 10**6)
