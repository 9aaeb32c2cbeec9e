"""The validation loss with its standard error: of all sequences, of each source of a mixture, of held-out corpora, and
under decoding policies."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from llada_lightning.checkpoints.description import excluded_token_id
from llada_lightning.data.validation import ValidationCorpus
from llada_lightning.evaluation.policy import Policy, most_masked, policy_log_likelihood
from llada_lightning.objectives.batches import ValidationBatch
from llada_lightning.objectives.block import hidden_beside_copy
from llada_lightning.objectives.standard_errors import clustered_mean_and_stderr, mean_by_cluster, ratio_and_stderr
from llada_lightning.records import POLICY_KEYS

if TYPE_CHECKING:
    from llada_lightning.training.language_module import LanguageModule

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


# --- under decoding policies ------------------------------------------------------------------------------------------


class PolicyLosses(torch.nn.Module):
    """The validation losses of the run's own validation sequences under decoding policies.

    Attributes:
        measured: Of each policy's label, what a record holds (``records.POLICY_KEYS``).
        by_document: Of each policy's label, the losses of the documents.
    """

    def __init__(self, policies: Sequence[Policy] = ()) -> None:
        super().__init__()
        self.policies = tuple(policies)
        self._losses = torch.nn.ModuleList(ValidationLoss() for _ in self.policies)
        self.clear()

    def clear(self) -> None:
        """Forgets what was measured."""
        self.measured: dict[str, dict[str, Any]] = {}
        self.by_document: dict[str, DocumentLosses] = {}

    def update(self, module: LanguageModule, batch: ValidationBatch) -> None:
        """Adds the sequences of a batch; metrics are shared by the processes that share those of the module."""
        for policy, loss in zip(self.policies, self._losses, strict=True):
            assert isinstance(loss, ValidationLoss)
            loss.process_group = module.val_loss.process_group
            nats_per_token_B = policy_nll(module, batch, policy) / batch.scored_counts()
            loss.update(nats_per_token_B[batch.counted_B], batch.documents_B[batch.counted_B])

    def compute(self, bits_per_byte: Callable[[float], float | None]) -> None:
        """Fills in what was measured, the same in all processes."""
        self.clear()
        for policy, loss in zip(self.policies, self._losses, strict=True):
            assert isinstance(loss, ValidationLoss)
            if loss.update_called:  # not in a validation during training
                nats, stderr, documents = loss.compute()
                loss.reset()
                sequences = sum(count for _, count, _ in documents)
                values = (nats, stderr, bits_per_byte(nats), len(documents), sequences)
                self.measured[policy.label] = dict(zip(POLICY_KEYS, values, strict=True))
                self.by_document[policy.label] = documents


def policy_nll(module: LanguageModule, batch: ValidationBatch, policy: Policy) -> Tensor:
    """(B,) float64: the exact negative log-likelihood of each sequence or response under a policy, in nats."""
    if not module.facts.masks:
        return module.sequence_nll(batch)  # in its own order, the only one that Policy.check lets through
    assert module.mask_token_id is not None
    masked_BL = batch.response_BL
    if masked_BL is None:
        masked_BL = torch.ones_like(batch.tokens_BL, dtype=torch.bool)
        if batch.attention_mask_BL is not None:
            masked_BL = batch.attention_mask_BL
    tokens_BL, states = batch.tokens_BL, _BatchStates(module, batch)
    if module.block_length is not None:  # the blocks of all sequences at once, each beside the clean ones before it
        states = _BlockStates(module, batch, module.block_length)
        tokens_BL, masked_BL = states.in_blocks(tokens_BL), states.in_blocks(masked_BL)
    most = torch.tensor(most_masked(masked_BL), device=masked_BL.device)
    if dist.is_initialized():  # of a sharded model all processes predict together
        dist.all_reduce(most, dist.ReduceOp.MAX)
    passes = policy.predictions(int(most))
    log_p_N = policy_log_likelihood(policy, tokens_BL, masked_BL, module.mask_token_id, states, passes)
    return -log_p_N.view(len(batch.tokens_BL), -1).sum(dim=1)


class _BatchStates:
    """The states of a validation batch, for ``policy.revealed_log_probs``."""

    def __init__(self, module: LanguageModule, batch: ValidationBatch) -> None:
        assert module.vocab_size is not None
        self._module, self._batch, self.vocab_size = module, batch, module.vocab_size

    def hidden(self, inputs_RL: Tensor, wanted_RL: Tensor, rows_R: Tensor) -> Tensor:
        documents_RL, attention_mask_RL = (
            None if own is None else own[rows_R] for own in (self._batch.documents_BL, self._batch.attention_mask_BL)
        )
        start_ids = self._module.start_ids(self._batch)
        hidden_RLD = self._module.hidden_after(start_ids, inputs_RL, documents_RL, attention_mask_RL, causal=False)
        return hidden_RLD[wanted_RL][None]

    def logits(self, hidden_GMD: Tensor) -> Tensor:
        logits_MV: Tensor = self._module.model.head(hidden_GMD[0]).float()
        excluded = excluded_token_id(self._module.compat, self._module.mask_token_id)
        if excluded is not None:
            logits_MV[:, excluded] = -torch.inf
        return logits_MV


class _BlockStates(_BatchStates):
    """The states of the blocks of a validation batch: a row is a block, and all blocks are predicted in one pass."""

    def __init__(self, module: LanguageModule, batch: ValidationBatch, block_length: int) -> None:
        super().__init__(module, batch)
        self._block_length, self._filling = block_length, -batch.tokens_BL.shape[1] % block_length
        self._tokens_BL, self._documents_BL = self._filled(batch.tokens_BL), None
        if batch.documents_BL is not None:
            self._documents_BL = self._filled(batch.documents_BL)
        real_BL = batch.attention_mask_BL
        if real_BL is None and self._filling:
            real_BL = torch.ones_like(batch.tokens_BL, dtype=torch.bool)
        self._real_BL = None if real_BL is None else self._filled(real_BL)

    def _filled(self, values_BL: Tensor) -> Tensor:
        """Values of whole blocks: False, or 0, behind the end."""
        return torch.nn.functional.pad(values_BL, (0, self._filling))

    def in_blocks(self, values_BL: Tensor) -> Tensor:
        """(B K, L'), a row for each block."""
        return self._filled(values_BL).reshape(-1, self._block_length)

    def hidden(self, inputs_RL: Tensor, wanted_RL: Tensor, rows_R: Tensor) -> Tensor:
        noisy_NK = self._tokens_BL.reshape(-1, self._block_length).clone()
        noisy_NK[rows_R] = inputs_RL
        hidden_BLD = hidden_beside_copy(
            self._module,
            noisy_NK.view_as(self._tokens_BL),
            self._tokens_BL,
            self._block_length,
            self._documents_BL,
            self._real_BL,
        )
        return hidden_BLD.reshape(*noisy_NK.shape, -1)[rows_R][wanted_RL][None]
