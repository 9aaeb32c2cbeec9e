"""Small models with random weights whose predictions are not flat, and the exact value of Eq. 6 by brute force."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer

VOCAB_SIZE, MASK, EOS = 40, 39, 38


def random_model(
    objective: str = "llada", scale: float = 4.0, seed: int = 0, vocab_size: int = VOCAB_SIZE, **fields: object
) -> LanguageModel:
    """A model of 40 words, [MASK] 39 and EOS 38, with an output head ``scale`` times as large as at initialisation.

    Its weights are drawn by numpy: those that torch draws from a seed are others in another version of torch.
    """
    model = Transformer(Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, d_ff=64), vocab_size)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.from_numpy(rng.normal(scale=weight.shape[1] ** -0.5, size=weight.shape)))
        model.head.weight *= scale
    start = EOS if objective == "arm" else None
    values = {"mask_token_id": MASK, "eos_token_id": EOS, "context_length": 48, "start_token_id": start, **fields}
    return LanguageModel(objective, model.eval(), **values)  # type: ignore[arg-type]


def shifted_model(**fields: object) -> LanguageModel:
    """A `llada` that predicts a token from the position before it, behind EOS, as one that began as an `arm`."""
    return random_model("llada", shift_targets=True, start_token_id=EOS, **fields)


class AtItsOwnPlace:
    """What is asked of a model in brute force, of one with shifted targets: the logits of each token at its place."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm, self.mask_token_id, self.excluded_token_id = lm, lm.mask_token_id, lm.excluded_token_id

    def logits(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        start_B1 = torch.full((len(tokens_BL), 1), EOS)
        return self._lm.logits(torch.cat([start_B1, tokens_BL], dim=1))[:, :-1]


def ids(length: int, seed: int) -> list[int]:
    """Random words, neither EOS nor [MASK]."""
    return np.random.default_rng(seed).integers(EOS, size=length).tolist()


def masked_log_prob(
    lm: LanguageModel | AtItsOwnPlace,
    prompt: Sequence[int],
    answer: Sequence[int],
    masked: Sequence[int],
    cfg_scale: float = 0.0,
) -> float:
    """Sum of log p of the masked tokens of the answer: one sequence, all its logits, no padding."""
    tokens = [*prompt, *(MASK if i in masked else token for i, token in enumerate(answer))]
    logits_LV = lm.logits(torch.tensor([tokens]))[0].clone()
    if cfg_scale:
        bare = [MASK] * len(prompt) + tokens[len(prompt) :]
        bare_LV = lm.logits(torch.tensor([bare]))[0]
        logits_LV = bare_LV + (1 + cfg_scale) * (logits_LV - bare_LV)
    if lm.excluded_token_id is not None:
        logits_LV[:, lm.excluded_token_id] = -math.inf
    log_p_LV = logits_LV.double().log_softmax(-1)
    return float(sum(log_p_LV[len(prompt) + i, answer[i]] for i in masked))


def exact_bound(
    lm: LanguageModel | AtItsOwnPlace, prompt: Sequence[int], answer: Sequence[int], cfg_scale: float = 0.0
) -> float:
    """Eq. 6 with its sign changed, over every l and every mask."""
    length = len(answer)
    means = []
    for count in range(1, length + 1):
        sums = [masked_log_prob(lm, prompt, answer, m, cfg_scale) for m in combinations(range(length), count)]
        means.append(length / count * sum(sums) / len(sums))
    return sum(means) / length
