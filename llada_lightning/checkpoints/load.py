"""``load_model``: any checkpoint as a model ready for inference."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.checkpoints.stored_model import StoredModel, open_checkpoint
from llada_lightning.checkpoints.stored_tensors import common_dtype, dtype_named
from llada_lightning.errors import UserError
from llada_lightning.model import Transformer
from llada_lightning.printing import shortened


def load_model(
    path: str | Path,
    tokenizer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> LanguageModel:
    """Reads a checkpoint of any kind.

    Weights come one by one, as views of their file where that can be: no second copy of the model is ever in memory.
    Nothing in a checkpoint is run.

    Args:
        path: a run's folder, or a branch's (the last checkpoint counts); a training checkpoint, one file or sharded; an
            inference folder of ours; a Hugging Face LLaDA or Llama folder.
        tokenizer: to take instead of the checkpoint's: a ``tokenizer.json``, a folder with one, a name on the hub.
        device: CUDA's where there is one, else the CPU, by default.
        dtype: of the weights, such as `bfloat16`; as stored by default.

    Raises:
        UserError: the path holds no checkpoint, or one that is not whole, of another architecture, or of a tokenizer
            that is not the model's; there is no such device or type.
    """
    wanted, place = dtype_named(dtype), _device_named(device)
    stored = open_checkpoint(path, tokenizer)
    description, files = stored.description, stored.tokenizer
    return LanguageModel(
        objective=description.objective,
        model=_transformer(stored, place, wanted or common_dtype(stored.weights.values())),
        mask_token_id=description.mask_token_id,
        eos_token_id=description.eos_token_id,
        context_length=description.context_length,
        tokenizer=None if files is None else files.tokenizer,
        end_token_ids=stored.end_token_ids,
        start_token_id=description.start_token_id,
        text_prefix_ids=stored.text_prefix_ids,
        compat=description.compat,
        chat_template=None if files is None else files.chat_template,
        special_tokens={} if files is None else files.special_tokens,
        name=str(path),
    )


def _device_named(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=device).device
    # No such name, none of that number, a build without it, a plug-in that is missing.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = shortened(str(error).splitlines()[0].rstrip("."))
        raise UserError(f"--device '{device}' cannot be used ({reason}); give cpu, or leave it out") from error
    if found.type == "meta":
        raise UserError(f"--device '{device}' cannot be used (it holds no numbers); give cpu, or leave it out")
    return found


def _transformer(stored: StoredModel, device: torch.device, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = stored.description.transformer()
    for name, weight in stored.weights.items():
        module, _, leaf = name.rpartition(".")
        value = weight.read().to(device=device, dtype=dtype)
        setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    return model.eval()
