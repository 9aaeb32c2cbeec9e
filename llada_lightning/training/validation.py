"""The validation loss with its standard error: of all sequences, of each source of a mixture, of held-out corpora."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from llada_lightning.data.validation import ValidationCorpus
from llada_lightning.objectives.standard_errors import clustered_mean_and_stderr, mean_by_cluster, ratio_and_stderr

DocumentLosses = list[tuple[int, int, float]]
"""Of each document its number, its number of sequences, and their mean loss in nats per token."""


class ValidationLoss(Metric):
    """Mean of per-sequence values and its standard error, clustered by document, in fp64.

    Every sequence's value is gathered from all ranks, so the result does not depend on how they were spread.
    """

    full_state_update = False
    values: list[Tensor]
    documents: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("documents", default=[], dist_reduce_fx="cat")

    def update(self, values_B: Tensor, documents_B: Tensor) -> None:
        """The value of each sequence, and the document that it begins in (int64)."""
        self.values.append(values_B.double())
        self.documents.append(documents_B)

    def compute(self) -> tuple[float, float, DocumentLosses]:
        """The mean over all sequences of all ranks, its standard error (NaN with fewer than two documents), and the
        document, the number of sequences and the mean of each document."""
        values, documents = dim_zero_cat(self.values), dim_zero_cat(self.documents)
        columns = (column_G.tolist() for column_G in mean_by_cluster(values, documents))
        return *clustered_mean_and_stderr(values, documents), list(zip(*columns, strict=True))


def corpus_loss(corpus: ValidationCorpus, documents: DocumentLosses) -> dict[str, Any]:
    """The loss of one corpus as a record holds it (``records.CORPUS_KEYS``), from the losses of its documents."""
    sequences = [count for _, count, _ in documents]
    nats, stderr = ratio_and_stderr([count * mean for _, count, mean in documents], sequences)
    return {
        "nats_per_token": nats,
        "stderr": stderr,
        "bits_per_byte": corpus.bits_per_byte(nats),
        "documents": len(documents),
        "sequences": sum(sequences),
        "first_document": corpus.first_document,
        "fingerprint": corpus.manifest.fingerprint,
    }


def losses_by_source(sources: Sequence[ValidationCorpus], documents: DocumentLosses) -> dict[str, dict[str, Any]]:
    """The loss of each source of a mixture by its name; a source of which no sequence was validated is left out.

    The documents are those of the total, gathered from all ranks: a source has those from its first one up to the first
    one of the next source.
    """
    starts = [source.first_document for source in sources]
    of_source: list[DocumentLosses] = [[] for _ in sources]
    for document in documents:
        of_source[bisect_right(starts, document[0]) - 1].append(document)
    return {source.name: corpus_loss(source, own) for source, own in zip(sources, of_source, strict=True) if own}


def as_metrics(prefix: str, losses: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The losses of corpora as metrics for the log: `PREFIX_nats_per_token/NAME`, `PREFIX_stderr/NAME`, and
    `PREFIX_bits_per_byte/NAME` where it is known."""
    return {
        f"{prefix}_{key}/{name}": float(loss[key])
        for name, loss in losses.items()
        for key in ("nats_per_token", "stderr", "bits_per_byte")
        if loss[key] is not None
    }
