"""The released sampler's way of working, written down plainly: what `sampler_speed.py` measures against.

Every step computes the logits of all positions, prompt and later blocks included, makes a softmax of them all, and
picks the tokens of each row in a Python loop. Nothing is kept between steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.inference_mode()
def sample_plainly(
    logits_of: Callable[[Tensor], Tensor],
    prompt_BP: Tensor,
    mask_token_id: int,
    *,
    length: int,
    steps: int,
    block_length: int,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    late_token_ids: tuple[int, ...] = (),
) -> Tensor:
    """Answers of a fixed length, (B, length) int64.

    Args:
        logits_of: tokens (B, L) to logits (B, L, V).
        steps: of the whole generation.
        late_token_ids: EOS and the end of a turn, whose confidence is to be zero.
    """
    batch, start = prompt_BP.shape
    x_BL = torch.full((batch, start + length), mask_token_id, device=prompt_BP.device)
    x_BL[:, :start] = prompt_BP
    is_prompt_BL = x_BL != mask_token_id
    blocks = length // block_length
    for block in range(blocks):
        end = start + (block + 1) * block_length
        todo_B = (x_BL[:, end - block_length : end] == mask_token_id).sum(dim=1)
        for step in range(steps // blocks):
            masked_BL = x_BL == mask_token_id
            if cfg_scale > 0:
                blind_BL = x_BL.masked_fill(is_prompt_BL, mask_token_id)
                seen_BLV, blind_BLV = logits_of(torch.cat([x_BL, blind_BL])).chunk(2)
                logits_BLV = blind_BLV + (cfg_scale + 1) * (seen_BLV - blind_BLV)
            else:
                logits_BLV = logits_of(x_BL)
            noisy_BLV = _with_gumbel_noise(logits_BLV, temperature)
            predicted_BL = noisy_BLV.argmax(dim=-1)
            if late_token_ids:  # at temperature 0 the two are one tensor, else EOS keeps its confidence
                noisy_BLV[..., late_token_ids[0]] = -torch.inf
                logits_BLV[..., list(late_token_ids[1:])] = -torch.inf
            if remasking == "random":
                confidence_BL = torch.rand(predicted_BL.shape, device=predicted_BL.device)
            else:
                confidence_BL = logits_BLV.softmax(dim=-1).gather(-1, predicted_BL[..., None])[..., 0]
            confidence_BL[:, end:] = -torch.inf
            confidence_BL = torch.where(masked_BL, confidence_BL, -torch.inf)
            for row in range(batch):
                share, rest = divmod(int(todo_B[row]), steps // blocks)
                best = confidence_BL[row].topk(share + (step < rest)).indices
                x_BL[row, best] = predicted_BL[row, best]
    return x_BL[:, start:]


def _with_gumbel_noise(logits_BLV: Tensor, temperature: float) -> Tensor:
    """Something whose argmax is a draw at ``temperature``, in float64."""
    if temperature == 0:
        return logits_BLV
    logits_BLV = logits_BLV.double()
    uniform_BLV = torch.rand_like(logits_BLV)
    return logits_BLV.exp() / (-uniform_BLV.log()) ** temperature
