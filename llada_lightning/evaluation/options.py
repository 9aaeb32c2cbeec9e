"""The ranges of the options of scoring; without torch, so that a command can check them before it reads a model."""

from __future__ import annotations

from llada_lightning.evaluation.masks import REPLICATES
from llada_lightning.support.errors import UserError


def check_sampling(
    samples: int,
    max_samples: int | None = None,
    target_stderr: float | None = None,
    confidence: float | None = None,
    cfg_scale: float = 0.0,
    batch_tokens: int | None = None,
) -> None:
    """Raises UserError for an option out of range; arguments as of ``log_likelihood`` and ``rank_candidates``.

    What stops by an estimated error, a target or a ranking, needs a first round of as many samples as replicates.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")
    if target_stderr is not None and not target_stderr > 0:
        raise UserError(f"target_stderr is {target_stderr}; it must be above 0 (nats)")
    if confidence is not None and not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}; it must lie between 0 and 1, as 0.99")
    if confidence is not None and samples < REPLICATES:
        raise UserError(f"samples is {samples}; a ranking needs at least {REPLICATES} to tell its error")
    first = samples if target_stderr is None else max(samples, REPLICATES)
    if max_samples is not None and max_samples < first:
        raise UserError(f"max_samples is {max_samples}, fewer than the {first} samples of the first round; raise it")
    if not cfg_scale >= 0:
        raise UserError(f"cfg_scale is {cfg_scale}; it must be at least 0")
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"batch_tokens is {batch_tokens}; it must be at least 1")
