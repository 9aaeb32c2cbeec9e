"""How noisy the losses and bounds of a `llada` checkpoint are.

    python experiments/study/variance.py RUN DATA OUT.json

Three questions, each at equal cost (one forward pass of a sequence a draw):

- `training`: the loss of Eq. 3 and its gradient on a batch whose tokens stay, with t of its sequences stratified by the
  Weyl sequence or drawn independently;
- `batches`: the same over consecutive batches, so that the tokens vary too: what an optimizer sees;
- `bound`: one sequence's bound by Eq. 12 (each token masked with probability t) and by Eq. 14 (exactly l masked), from
  independent draws and from draws with t or l stratified.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor

from llada_lightning import load_model
from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.data.datasets import TokenStream
from llada_lightning.data.manifest import read_manifest
from llada_lightning.model import Transformer
from llada_lightning.objectives import forward_process
from llada_lightning.objectives.forward_process import TimeSampling, fixed_count_mask, mask_probability, random_mask
from llada_lightning.study.fits import Estimate
from llada_lightning.support.files import write_json

GLOBAL_BATCH = 16
BATCHES, SEEDS = 16, 128
"""Batches of fixed tokens, and draws of the noise for each."""
BLOCKS, CONSECUTIVE = 16, 64
"""Blocks of batches one after the other, of tokens that vary."""
SEQUENCES, DRAWS, REPEATS = 256, 16, 32
"""Of the bounds: sequences, draws behind one estimate, estimates of each sequence."""
RESAMPLES = 4000

Array = npt.NDArray[np.float64]


def main(run: str, data: str, out: Path) -> None:
    lm = load_model(run)
    trained, tokens = lm.model, Tokens(data, lm.context_length)
    trained.requires_grad_(True)  # a loaded model has no gradients
    fresh = Transformer(trained.shape, trained.vocab_size, trained.rope_theta)
    fresh.initialise(torch.Generator().manual_seed(0))
    write_json(
        out,
        {
            "run": Path(run).name,
            "sequence_length": lm.context_length,
            "global_batch": GLOBAL_BATCH,
            "training": {
                "batches": BATCHES,
                "draws": SEEDS,
                "at the start": noise_of_training(lm, fresh, tokens),
                "trained": noise_of_training(lm, trained, tokens),
            },
            "batches": {
                "blocks": BLOCKS,
                "batches": CONSECUTIVE,
                "at the start": noise_of_batches(lm, fresh, tokens),
                "trained": noise_of_batches(lm, trained, tokens),
            },
            "bound": {"sequences": SEQUENCES, "draws": DRAWS, "repeats": REPEATS, **noise_of_bounds(lm, tokens)},
        },
    )


class Tokens:
    """Sequences of both splits, by ordinal."""

    def __init__(self, folder: str, sequence_length: int) -> None:
        self.length = sequence_length
        self._streams = {
            split: TokenStream([folder], [read_manifest(folder)], split, [1.0], sequence_length, 0, 16)
            for split in ("train", "val")
        }

    def __call__(self, split: str, first: int, count: int) -> Tensor:
        """(count, L) int64."""
        return self._streams[split].tokens(range(first, first + count))


# --- the training loss -----------------------------------------------------------------------------------------------


def noise_of_training(lm: LanguageModel, model: Transformer, tokens: Tokens) -> dict[str, Any]:
    """Variance of loss and gradient over the noise alone, mean over batches, by how t is drawn."""

    def variances(sampling: TimeSampling) -> list[dict[str, float]]:
        return [
            spread(
                loss_and_gradient(lm, model, tokens("train", first, GLOBAL_BATCH), seed, first, sampling)
                for seed in range(SEEDS)
            )
            for first in track(range(0, BATCHES * GLOBAL_BATCH, GLOBAL_BATCH), f"training, {sampling}")
        ]

    return compared(variances("weyl"), variances("iid"))


def noise_of_batches(lm: LanguageModel, model: Transformer, tokens: Tokens) -> dict[str, Any]:
    """Variance of loss and gradient over consecutive batches of one run, tokens and noise, by how t is drawn."""

    def variances(sampling: TimeSampling) -> list[dict[str, float]]:
        firsts = np.arange(BLOCKS * CONSECUTIVE).reshape(BLOCKS, CONSECUTIVE) * GLOBAL_BATCH
        return [
            spread(
                loss_and_gradient(lm, model, tokens("train", int(first), GLOBAL_BATCH), 0, int(first), sampling)
                for first in block
            )
            for block in track(firsts, f"batches, {sampling}")
        ]

    return compared(variances("weyl"), variances("iid"))


def loss_and_gradient(
    lm: LanguageModel, model: Transformer, tokens_BL: Tensor, seed: int, first: int, sampling: TimeSampling
) -> tuple[float, Array]:
    """Loss of Eq. 3 in nats per token, and its gradient by all parameters as one vector."""
    ordinals = np.arange(first, first + len(tokens_BL))
    p_B = mask_probability(forward_process.mask_ratio(seed, ordinals, sampling))
    masked_BL = torch.from_numpy(random_mask(seed, ordinals, p_B, tokens_BL.shape[1]))
    model.zero_grad()
    nll_BL = masked_nll(lm, model, tokens_BL, masked_BL)
    loss = (nll_BL / torch.from_numpy(p_B)[:, None]).sum() / tokens_BL.numel()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(loss.detach()), gradient.double().numpy()


def spread(draws: Any) -> dict[str, float]:
    """Variance of the loss, and the trace of the gradient's covariance, over draws; one pass, little memory."""
    losses, total, squares, count = [], np.zeros(1), 0.0, 0
    for loss, gradient in draws:
        losses.append(loss)
        total = total + gradient
        squares += float(gradient @ gradient)
        count += 1
    mean = total / count
    return {
        "loss": float(np.var(losses, ddof=1)),
        "gradient": (squares - count * float(mean @ mean)) / (count - 1),
        "mean_loss": float(np.mean(losses)),
    }


def compared(weyl: list[dict[str, float]], iid: list[dict[str, float]]) -> dict[str, Any]:
    """Means over batches, and how many times the variance of independent t is that of stratified t."""
    columns = {
        name: {key: np.array([one[key] for one in ones]) for key in ones[0]}
        for name, ones in (("weyl", weyl), ("iid", iid))
    }
    means = {name: {key: float(values.mean()) for key, values in own.items()} for name, own in columns.items()}
    ratios = {key: ratio_of_means(columns["iid"][key], columns["weyl"][key]) for key in ("loss", "gradient")}
    return {**means, "iid_over_weyl": ratios}


def ratio_of_means(over: Array, under: Array) -> dict[str, Any]:
    """Of paired values, with the 95 % interval of a bootstrap over the pairs."""
    rows = np.random.default_rng(0).integers(len(over), size=(RESAMPLES, len(over)))
    drawn = over[rows].mean(axis=1) / under[rows].mean(axis=1)
    return Estimate.of(over.mean() / under.mean(), drawn).as_dict()


# --- the bound -------------------------------------------------------------------------------------------------------


def noise_of_bounds(lm: LanguageModel, tokens: Tokens) -> dict[str, Any]:
    """Variance of a sequence's bound from ``DRAWS`` draws, (nats per token)^2, mean over sequences, by estimator."""
    estimators: dict[str, Callable[[int, npt.NDArray[np.int64], int], tuple[Tensor, Array]]] = {
        "eq12_iid": lambda seed, ordinals, length: by_probability(seed, ordinals, length, "iid"),
        "eq12_stratified": lambda seed, ordinals, length: by_probability(seed, ordinals, length, "weyl"),
        "eq14_iid": lambda seed, ordinals, length: by_count(seed, ordinals, length, "iid"),
        "eq14_stratified": lambda seed, ordinals, length: by_count(seed, ordinals, length, "weyl"),
    }
    values: dict[str, list[Array]] = {name: [] for name in estimators}
    for number in track(range(SEQUENCES), "bounds"):
        tokens_BL = tokens("val", number, 1).expand(DRAWS * REPEATS, -1)
        # Of each estimate DRAWS consecutive ordinals, of which any window is stratified; a seed of its own for each.
        ordinals = np.arange(DRAWS)
        for name, masks in estimators.items():
            drawn = [masks(number * REPEATS + repeat, ordinals, tokens.length) for repeat in range(REPEATS)]
            masked_BL, weights_B = torch.cat([m for m, _ in drawn]), np.concatenate([w for _, w in drawn])
            with torch.no_grad():
                sums_B = masked_nll(lm, lm.model, tokens_BL, masked_BL).sum(dim=1).double().numpy()
            values[name].append((sums_B * weights_B).reshape(REPEATS, DRAWS).mean(axis=1) / tokens.length)
    found = {name: np.stack(estimates) for name, estimates in values.items()}
    variances = {name: estimates.var(axis=1, ddof=1) for name, estimates in found.items()}
    best = variances["eq14_stratified"]
    return {
        "variance": {name: float(variance.mean()) for name, variance in variances.items()},
        "mean": {name: float(estimates.mean()) for name, estimates in found.items()},
        "over_eq14_stratified": {name: ratio_of_means(variance, best) for name, variance in variances.items()},
    }


def by_probability(
    seed: int, ordinals: npt.NDArray[np.int64], length: int, sampling: TimeSampling
) -> tuple[Tensor, Array]:
    """Masks of Eq. 12 and their weights 1/t."""
    p_B = mask_probability(forward_process.mask_ratio(seed, ordinals, sampling))
    return torch.from_numpy(random_mask(seed, ordinals, p_B, length)), 1 / p_B


def by_count(seed: int, ordinals: npt.NDArray[np.int64], length: int, sampling: TimeSampling) -> tuple[Tensor, Array]:
    """Masks of Eq. 14 and their weights L/l."""
    counts_B = 1 + np.floor(forward_process.mask_ratio(seed, ordinals, sampling) * length).astype(np.int64)
    return torch.from_numpy(fixed_count_mask(seed, ordinals, counts_B, length)), length / counts_B


def masked_nll(lm: LanguageModel, model: Transformer, tokens_BL: Tensor, masked_BL: Tensor) -> Tensor:
    """(B, L) negative log-likelihood of the masked tokens, 0 elsewhere."""
    assert lm.mask_token_id is not None
    logits_BLV = model(tokens_BL.masked_fill(masked_BL, lm.mask_token_id), causal=False)
    logits_BLV[..., lm.mask_token_id] = float("-inf")
    nll_BL = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none")
    return nll_BL * masked_BL


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    main(arguments[0], arguments[1], Path(arguments[2]))
