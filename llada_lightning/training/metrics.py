"""A validation loss with its standard error, over sequences, documents and ranks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from llada_lightning.objectives.standard_errors import clustered_mean_and_stderr, mean_by_cluster


class ValidationSummary(NamedTuple):
    """Mean, standard error (NaN with fewer than two documents), and (document, sequences, mean) of each document."""

    mean: float
    stderr: float
    by_document: list[tuple[int, int, float]]


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
        """Args: values_B: (B,) of each sequence; documents_B: (B,) int64, the document that each begins in."""
        self.values.append(values_B.double())
        self.documents.append(documents_B)

    def compute(self) -> ValidationSummary:
        """The mean over all sequences of all ranks, its standard error, and the documents' means."""
        values, documents = dim_zero_cat(self.values), dim_zero_cat(self.documents)
        columns = (column_G.tolist() for column_G in mean_by_cluster(values, documents))
        return ValidationSummary(*clustered_mean_and_stderr(values, documents), list(zip(*columns, strict=True)))
