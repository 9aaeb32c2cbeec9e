"""What a plan needs to know of prepared data."""

from __future__ import annotations

from llada_lightning.data.manifest import check_sequence_length, read_manifest
from llada_lightning.errors import UserError
from llada_lightning.scaling.stream import DataFacts, Source


def read_data_facts(path: str | dict[str, float], sequence_length: int) -> DataFacts:
    """Vocabulary and training sequences of a prepared folder, or of a weighted mixture of folders.

    Args:
        path: a folder, or folders with weights.
        sequence_length: tokens of a sequence; a shard's rest that fills none is not counted.

    Raises:
        UserError: a folder is not a prepared one, its shards are too short, or the tokenizers differ.
    """
    weights = {path: 1.0} if isinstance(path, str) else path
    manifests = {folder: read_manifest(folder) for folder in weights}
    for manifest in manifests.values():
        check_sequence_length(manifest, sequence_length)
    if len({manifest.tokenizer.fingerprint for manifest in manifests.values()}) > 1:
        raise UserError(f"data: {', '.join(weights)} have different tokenizers; prepare all with --tokenizer of one")
    sources = tuple(
        Source(weights[folder], manifest.splits["train"].items(sequence_length))
        for folder, manifest in manifests.items()
    )
    return DataFacts(next(iter(manifests.values())).tokenizer.vocab_size, sources)
