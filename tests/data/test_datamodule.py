"""Batches are functions of (seed, ordinal): whatever the ranks, accumulation, micro-batch and workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from litdata import StreamingDataset, TokensLoader

from llada_lightning.data.datamodule import TokenDataModule
from llada_lightning.data.manifest import read_data_facts, read_manifest
from llada_lightning.data.validation import mixture_sources
from llada_lightning.objectives.batches import TrainingBatch
from llada_lightning.objectives.forward_process import random_lengths
from llada_lightning.run import Stream
from llada_lightning.support.errors import UserError

L, G = 32, 8


def module(
    path: Any, rank: int = 0, ranks: int = 1, accumulation: int = 1, step: int = 0, **settings: Any
) -> TokenDataModule:
    data = TokenDataModule(path=path, sequence_length=L, global_batch=G, **settings)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=step,
        distributed_sampler_kwargs={"rank": rank, "num_replicas": ranks},
        accumulate_grad_batches=accumulation,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def batches(data: TokenDataModule, count: int) -> list[TrainingBatch]:
    return [batch for batch, _ in zip(data.train_dataloader(), range(count), strict=False)]


def merged(data: list[TokenDataModule], steps: int) -> dict[int, tuple[list[int], list[bool], float]]:
    """Ordinal -> tokens, mask and p, over all ranks."""
    found = {}
    for one in data:
        for batch in batches(one, steps * G // (one.micro_batch * len(data))):
            for i, n in enumerate(batch.ordinals_B.tolist()):
                assert n not in found
                found[n] = (batch.tokens_BL[i].tolist(), batch.masked_BL[i].tolist(), float(batch.p_B[i]))
    return found


def stored_blocks(folder: Path) -> list[list[int]]:
    stored = StreamingDataset(str(folder / "train"), item_loader=TokensLoader(block_size=L))
    return [stored[i].tolist() for i in range(len(stored))]


@pytest.mark.parametrize(("ranks", "accumulation", "workers"), [(1, 2, 0), (2, 1, 0), (2, 2, 1), (1, 1, 2), (4, 2, 0)])
def test_any_split_of_the_global_batch_sees_the_same(
    prepared: Path, ranks: int, accumulation: int, workers: int
) -> None:
    reference = merged([module(str(prepared))], steps=3)
    assert sorted(reference) == list(range(3 * G))
    split = [module(str(prepared), r, ranks, accumulation, workers=workers) for r in range(ranks)]
    assert merged(split, steps=3) == reference


def test_a_resumed_stream_goes_on_with_the_next_ordinal(prepared: Path) -> None:
    whole = batches(module(str(prepared)), 6)
    for resumed, expected in zip(batches(module(str(prepared), step=4), 2), whole[4:], strict=True):
        assert resumed.ordinals_B.tolist() == expected.ordinals_B.tolist()
        assert torch.equal(resumed.tokens_BL, expected.tokens_BL)
        assert torch.equal(resumed.masked_BL, expected.masked_BL)


def test_ranks_never_share_masks(prepared: Path) -> None:
    masks = [batches(module(str(prepared), r, 2), 4) for r in range(2)]
    rows = [tuple(row) for of_rank in masks for batch in of_rank for row in batch.masked_BL.tolist() if any(row)]
    assert len(set(rows)) > len(rows) - 4  # short masks may coincide by chance; whole streams may not
    assert not torch.equal(masks[0][0].masked_BL, masks[1][0].masked_BL)


def test_an_epoch_reads_every_block_once(prepared: Path) -> None:
    data = module(str(prepared), random_length_share=0.0)
    blocks = sorted(stored_blocks(prepared))
    steps = -(-len(blocks) // G)
    read = [row for batch in batches(data, steps) for row in batch.tokens_BL.tolist()]
    assert sorted(read[: len(blocks)]) == blocks
    assert data.epochs(steps) == steps * G / len(blocks)


def test_few_training_tokens_are_read_again_and_again(prepared: Path) -> None:
    """The same ones by every seed; the record counts them, and validation does not change."""
    limited = [module(str(prepared), random_length_share=0.0, train_tokens=5 * L, seed=seed) for seed in (0, 1)]
    first, second = ([row for batch in batches(data, 5) for row in batch.tokens_BL.tolist()] for data in limited)
    assert sorted(first) == sorted(second) and first != second
    assert len(set(map(tuple, first))) == 5 and first.count(first[0]) == 8
    assert limited[0].unique_tokens(5) == 5 * L and limited[0].epochs(5) == 8
    whole = module(str(prepared), random_length_share=0.0)
    validated = [[batch.tokens_BL.tolist() for batch in data.val_dataloader()] for data in (limited[0], whole)]
    assert validated[0] == validated[1]


def test_a_mixture_shares_its_training_tokens_by_weight(prepared: Path, prepared_second: Path) -> None:
    data = module({str(prepared): 1, str(prepared_second): 3}, random_length_share=0.0, train_tokens=8 * L)
    read = [tuple(row) for batch in batches(data, 8) for row in batch.tokens_BL.tolist()]
    second = set(map(tuple, stored_blocks(prepared_second)))
    assert len(set(read)) == 8 and len(set(read) & second) == 6


def test_training_tokens_of_no_sequence_are_refused(prepared: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train_tokens: 31 is below one sequence of 32"):
        module(str(prepared), train_tokens=31)


def test_mixture_reads_each_source_by_its_weight(prepared: Path, prepared_second: Path) -> None:
    data = module({str(prepared): 1, str(prepared_second): 3})
    stream = data.train_dataloader().dataset.stream
    sources = np.array([stream.locate(n)[0] for n in range(400)])
    assert (sources == 1).sum() == 300
    known = set(map(tuple, stored_blocks(prepared_second)))
    mixed = module(data.weights, random_length_share=0.0)
    read = [tuple(row) for batch in batches(mixed, 10) for row in batch.tokens_BL.tolist()]
    assert sum(row in known for row in read) == 60


def test_random_lengths_pad_with_eos_and_count_true_tokens(prepared: Path) -> None:
    data = module(str(prepared), random_length_share=0.5, seed=3)
    for step, batch in enumerate(batches(data, 5)):
        ordinals = np.arange(step * G, (step + 1) * G)
        lengths = random_lengths(3, ordinals, L, 0.5)
        assert batch.attention_mask_BL is not None
        assert batch.attention_mask_BL.sum(1).tolist() == lengths.tolist()
        assert batch.global_tokens == batch.denominator == lengths.sum()
        padded = ~batch.attention_mask_BL
        assert (batch.tokens_BL[padded] == data.tokenizer.eos_id).all()
        assert not batch.masked_BL[padded].any()


def test_full_sequences_carry_no_attention_mask(prepared: Path) -> None:
    assert all(b.attention_mask_BL is None for b in batches(module(str(prepared), random_length_share=0.0), 3))


def test_documents_are_numbered_where_attention_stays_within_them(prepared: Path) -> None:
    """By the true tokens, masked or not; without the option no batch carries them, and nothing else differs."""
    data, plain = module(str(prepared), document_mask=True), module(str(prepared))
    crossed = 0
    for batch, without in zip(batches(data, 20), batches(plain, 20), strict=True):
        assert without.documents_BL is None and batch.documents_BL is not None
        assert batch._replace(documents_BL=None).tokens_BL.equal(without.tokens_BL)
        assert batch.masked_BL.equal(without.masked_BL)
        for tokens, documents in zip(batch.tokens_BL.tolist(), batch.documents_BL.tolist(), strict=True):
            before = [tokens[:i].count(data.tokenizer.eos_id) for i in range(L)]
            assert documents == before
        crossed += int((batch.masked_BL & (batch.tokens_BL == data.tokenizer.eos_id)).sum())
    assert crossed  # an EOS that is masked ends its document all the same
    for validated, without in zip(data.val_dataloader(), plain.val_dataloader(), strict=True):
        assert without.documents_BL is None
        ends_BL = (validated.tokens_BL == data.tokenizer.eos_id).long()
        assert validated.documents_BL.equal(ends_BL.cumsum(dim=1) - ends_BL)
        assert validated.documents_B.equal(without.documents_B)


def test_micro_batches_of_a_step_share_its_token_count(prepared: Path) -> None:
    data = module(str(prepared), accumulation=4, random_length_share=0.5)
    step = batches(data, 4)
    assert {b.global_tokens for b in step} == {step[0].global_tokens}
    assert sum(b.denominator for b in step) == pytest.approx(step[0].global_tokens)


@pytest.mark.parametrize(("ranks", "batch"), [(1, 4), (2, 4), (3, 5)])
def test_validation_covers_each_sequence_once_over_ranks(prepared: Path, ranks: int, batch: int) -> None:
    counted, steps = [], set()
    for rank in range(ranks):
        data = module(str(prepared), rank, ranks, val_batch=batch, val_sequences=18, micro_batch=None)
        data.trainer.accumulate_grad_batches = 1
        data.global_batch = ranks * batch  # any exact batch; the validation set must not depend on it
        loaded = list(data.val_dataloader())
        steps.add(len(loaded))
        counted += [tuple(row) for b in loaded for row in b.tokens_BL[b.counted_B].tolist()]
    stream = data.val_dataloader().dataset.stream
    assert sorted(counted) == sorted(tuple(row) for row in stream.tokens(list(range(18))).tolist())
    assert len(steps) == 1  # every rank runs the same number of batches


def test_validation_noise_is_the_same_for_every_run(prepared: Path) -> None:
    def all_of(**settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loaded = list(module(str(prepared), **settings).val_dataloader())
        return torch.cat([b.tokens_BL for b in loaded]), torch.cat([b.masked_BL for b in loaded])

    tokens, masked = all_of(seed=0, val_sequences=16)
    other_tokens, other_masked = all_of(seed=5, val_sequences=16, random_length_share=0.5)
    assert torch.equal(tokens, other_tokens)
    assert torch.equal(masked, other_masked)


def test_validation_takes_no_sequence_twice(prepared: Path, prepared_second: Path) -> None:
    data = module({str(prepared): 1, str(prepared_second): 9}, val_sequences=None)
    stream = data.val_dataloader().dataset.stream
    sequences = data.val_dataloader().dataset.sequences
    located = [stream.locate(n) for n in range(sequences)]
    assert len(set(located)) == sequences > 0


def test_sequences_know_the_document_they_begin_in(prepared: Path, prepared_second: Path) -> None:
    data = module({str(prepared): 1, str(prepared_second): 2}, val_sequences=None)
    eos = data.tokenizer.eos_id
    loaded = [b.documents_B[b.counted_B].tolist() for b in data.val_dataloader()]
    stream = data.val_dataloader().dataset.stream
    documents = [document for of_batch in loaded for document in of_batch]
    assert documents == [stream.document(n, eos) for n in range(len(documents))]
    for source, folder in enumerate((prepared, prepared_second)):
        stored = StreamingDataset(str(folder / "val"), item_loader=TokensLoader(block_size=L))
        ended, by_item = 0, {}
        for i in range(len(stored)):
            by_item[i] = ended
            ended += int((stored[i] == eos).sum())
        own = [(n, by_item[stream.locate(n)[1]]) for n in range(len(documents)) if stream.locate(n)[0] == source]
        pairs = {(documents[n], ordinal) for n, ordinal in own}
        assert len(pairs) == len({d for d, _ in pairs}) == len({o for _, o in pairs})


def test_the_number_of_a_document_tells_its_source(prepared: Path, prepared_second: Path) -> None:
    data = module({str(prepared): 2, str(prepared_second): 1}, val_sequences=None)
    starts = [source.first_document for source in data.val_sources]
    assert starts == [0, read_manifest(str(prepared)).splits["val"].items(L) * L]
    dataset = data.val_dataloader().dataset
    for n in range(dataset.sequences):
        document = dataset.stream.document(n, data.tokenizer.eos_id)
        assert (document >= starts[1]) == dataset.stream.locate(n)[0]
    assert module(str(prepared)).val_sources == []


def test_sources_are_named_by_their_folders(prepared: Path) -> None:
    manifest = read_manifest(str(prepared))

    def names(*folders: str) -> list[str]:
        return [source.name for source in mixture_sources(folders, [manifest] * len(folders), L)]

    assert names("data/web/", "s3://bucket/code") == ["web", "code"]
    assert names("a/data", "b/data", "c/books") == ["a/data", "b/data", "books"]


def test_held_out_corpora_are_read_outside_of_training_only(prepared: Path, prepared_second: Path) -> None:
    data = module(str(prepared), held_out={"more": str(prepared_second)}, val_sequences=16)
    data.trainer.state = SimpleNamespace(fn=TrainerFn.FITTING)
    own = list(data.val_dataloader())
    data.trainer.state = SimpleNamespace(fn=TrainerFn.VALIDATING)
    again, more = data.val_dataloader()
    assert all(a.tokens_BL.equal(b.tokens_BL) for a, b in zip(own, again, strict=True))
    alone = module(str(prepared_second), val_sequences=16).val_dataloader()
    for one, other in zip(more, alone, strict=True):
        assert one.tokens_BL.equal(other.tokens_BL) and one.masked_BL.equal(other.masked_BL)
        assert one.documents_B.equal(other.documents_B)
    assert len(list(data.predict_dataloader())) == len(own)


def test_a_shard_is_looked_through_once_to_find_where_documents_begin(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = module(str(prepared), val_sequences=None)
    stream, sequences = data.val_dataloader().dataset.stream, data.val_dataloader().dataset.sequences
    read, fromfile = [], np.fromfile
    monkeypatch.setattr(
        np, "fromfile", lambda path, *rest, **more: (read.append(path), fromfile(path, *rest, **more))[1]
    )
    never = 10**6  # as if all of the split were one document: each search goes on to its beginning
    assert {stream.document(n, never) for n in range(sequences)} == {0}
    shards = read_manifest(str(prepared)).splits["val"].shards
    assert len(read) == len(set(read)) == sum(shard.tokens >= L for shard in shards) > 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"val_sequences": 0}, "val_sequences"),
        ({"val_batch": -4}, "val_batch"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"workers": -1}, "workers"),
        ({"window_shards": 0}, "window_shards"),
        ({"random_length_share": 1.5}, "random_length_share"),
        ({"mask_eps": 0.0}, "mask_eps"),
    ],
)
def test_numbers_out_of_range_are_refused(prepared: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.{named}: "):
        TokenDataModule(str(prepared), **settings)


def test_a_home_folder_and_a_file_url_are_local(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(prepared.parent))
    expected = batches(module(str(prepared)), 1)[0].tokens_BL
    for spelling in (f"~/{prepared.name}", f"file://{prepared}", f"{prepared}/"):
        assert torch.equal(batches(module(spelling), 1)[0].tokens_BL, expected)


def test_a_remote_folder_streams_the_same(prepared: Path) -> None:
    local = batches(module(str(prepared)), 2)
    remote = batches(module(f"local:{prepared}"), 2)
    assert all(torch.equal(a.tokens_BL, b.tokens_BL) for a, b in zip(local, remote, strict=True))


@pytest.mark.parametrize(
    ("batch", "micro_batch", "devices", "message"),
    [
        (10, 4, 1, "10 is not micro-batch 4 x 1 device.* nearest global batches: 8 or 12 with accumulation 2 or 3"),
        (16, 4, 2, "set --trainer.accumulate_grad_batches 2"),
        (7, None, 2, "nearest global batches: 6 or 8"),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused(
    batch: int, micro_batch: int | None, devices: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TokenDataModule("data", global_batch=batch, micro_batch=micro_batch).exact_micro_batch(devices, 1)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_global_batch_that_divides_gives_the_micro_batch(micro_batch: int | None) -> None:
    assert TokenDataModule("data", global_batch=16, micro_batch=micro_batch).exact_micro_batch(2, 2) == 4


def test_what_cannot_be_trained_on_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llada prepare"):
        module(str(tmp_path)).check()
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    next((copy / "train").glob("*.bin")).unlink()
    with pytest.raises(UserError, match="is missing"):
        module(str(copy)).check()
    with pytest.raises(UserError, match="4096 is longer than every shard"):
        TokenDataModule(str(prepared), sequence_length=4096).check()
    with pytest.raises(UserError, match="4096 is longer than every shard"):
        read_data_facts(str(prepared), 4096)


def test_a_mixture_of_two_tokenizers_is_refused(prepared: Path, tmp_path: Path) -> None:
    from helpers.small_corpora import write_corpus
    from llada_lightning.data.prepare import prepare

    other = write_corpus(tmp_path / "text", first=500)
    prepare(str(other), str(tmp_path / "data"), vocab_size=300, val_fraction=0.2, progress=False)
    with pytest.raises(UserError, match="another tokenizer"):
        module({str(prepared): 1, str(tmp_path / "data"): 1}).check()


def test_the_epochs_of_a_plan_are_those_of_the_data_module(prepared: Path, prepared_second: Path) -> None:
    mixture = {str(prepared): 3.0, str(prepared_second): 1.0}
    facts = read_data_facts(mixture, 32)
    data = TokenDataModule(path=mixture, sequence_length=32, global_batch=8)
    assert facts.vocab_size == data.tokenizer.vocab_size
    epochs = Stream(facts.vocab_size, 32, sources=facts.sources).epochs(500 * 8)
    assert epochs == pytest.approx(data.epochs(500), rel=0.01)  # whole sequences there, expected ones here
