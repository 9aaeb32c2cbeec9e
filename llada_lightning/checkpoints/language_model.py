"""A model ready for inference: weights, tokenizer and special ids; ``load_model`` reads any checkpoint as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from llada_lightning.checkpoints.description import excluded_token_id
from llada_lightning.checkpoints.stored_model import open_checkpoint
from llada_lightning.checkpoints.stored_tensors import common_dtype, dtype_named
from llada_lightning.data.chat import ChatTemplate
from llada_lightning.data.encoding import decode, encode, lost_bytes
from llada_lightning.model import Transformer
from llada_lightning.model.patterns import Pattern, block_causal
from llada_lightning.objectives import Objective, get_objective
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

_ANCHORS = ("\n", "a")
"""The characters behind which a text is encoded; a tokenizer hardly ever merges them with its first character."""


@dataclass(frozen=True)
class LanguageModel:
    """The model of every command and function of inference, whatever file it came from.

    Args:
        objective: The name of the objective, such as `llada`.
        model: The Transformer, in evaluation mode.
        mask_token_id: The id of [MASK]; None where an `arm` has none.
        eos_token_id: The id of EOS, which ends a text.
        context_length: The largest number of tokens, prompt and answer together, that it was trained on.
        tokenizer: The tokenizer; None where the folder holds none: then prompts are token ids.
        end_token_ids: The ids of all tokens that end an answer: EOS, and the end of a turn where a chat model has one.
        start_token_id: The id of the token before every sequence, as in the model's training: EOS for our `arm`; None:
            no such token.
        text_prefix_ids: The token ids before a prompt that is given as text, such as the BOS that a Llama's tokenizer
            adds.
        compat: The objective whose released code is followed: `llada` where [MASK] had a logit in training.
        block_length: The number of tokens of a block, of a model that predicts in blocks; None of others.
        shift_targets: Whether a masked token is predicted from the position before it.
        chat_template: The chat template in Jinja; None where there is none.
        special_tokens: The special tokens by their names in a chat template, such as ``bos_token``, as in the
            tokenizer's files.
        name: The path that the model was read from, for messages.
    """

    objective: str
    model: Transformer
    mask_token_id: int | None
    eos_token_id: int
    context_length: int
    tokenizer: Tokenizer | None = None
    end_token_ids: tuple[int, ...] = ()
    start_token_id: int | None = None
    text_prefix_ids: tuple[int, ...] = ()
    compat: Literal["llada"] | None = None
    block_length: int | None = None
    shift_targets: bool = False
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if self.eos_token_id not in self.end_token_ids:
            object.__setattr__(self, "end_token_ids", (self.eos_token_id, *self.end_token_ids))

    @property
    def facts(self) -> Objective:
        """The facts of its objective."""
        return get_objective(self.objective)

    @property
    def causal(self) -> bool:
        return self.facts.causal

    def pattern(self, positions_BL: Tensor | None = None) -> Pattern | None:
        """What each input sees, of a model that predicts in blocks; None: everything, or what is before it.

        Args:
            positions_BL: (B, L) int64, the position of each input in its text; None: one after the other.
        """
        return None if self.block_length is None else block_causal(self.block_length, positions_BL)

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @cached_property
    def dialogue(self) -> ChatTemplate | None:
        """The chat format, which turns messages into tokens; None where there is no chat template."""
        if self.chat_template is None:
            return None
        acting = (*self.end_token_ids, self.mask_token_id, *self.text_prefix_ids)
        return ChatTemplate.of(
            self.chat_template, self._tokenizer, self.eos_token_id, acting, self.name, self.special_tokens
        )

    @property
    def excluded_token_id(self) -> int | None:
        return excluded_token_id(self.compat, self.mask_token_id)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LanguageModel:
        """The same model elsewhere or in another floating type; the weights are moved, not copied."""
        return replace(self, model=self.model.to(device=device, dtype=dtype))

    @torch.inference_mode()
    def logits(self, tokens_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor:
        """Logits of every position as the weights give them, [MASK]'s included.

        Args:
            tokens_BL: (B, L) int64; no token is put before it.
            attention_mask_BL: (B, L), False or 0 where a token is padding, on either side; on the right only of a model
                that predicts in blocks.

        Returns:
            (B, L, V) float32: `llada` predicts the token at each position, `arm` the one behind it, as does a `llada`
            whose targets are shifted.
        """
        if attention_mask_BL is not None:
            attention_mask_BL = attention_mask_BL.to(self.device).bool()
        logits_BLV: Tensor = self.model(
            tokens_BL.to(self.device),
            causal=self.causal,
            attention_mask_BL=attention_mask_BL,
            pattern=self.pattern(),
        )
        return logits_BLV.float()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, which never hold a special token."""
        return encode(self._tokenizer, text)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt that is given as text: the tokenizer's prefix, then the text's own ids."""
        return [*self.text_prefix_ids, *self.encode(text)]

    def encode_within(self, text: str) -> list[int]:
        """The ids of a text behind other tokens, encoded by itself.

        Some tokenizers put a space before whatever they encode (SentencePiece's): so it is encoded behind a character.
        """
        for anchor in _ANCHORS:
            head, whole = self.encode(anchor), self.encode(anchor + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.encode(text)

    def encode_after(self, before: str, text: str) -> list[int]:
        """The ids of a text that follows another one, to be put behind the ids of that one.

        They are the rest of the encoding of both, where that begins with the ids of ``before``. Where a token spans the
        join, or the encoding differs otherwise, no place parts it rightly: then the text is encoded by itself.
        """
        head, whole = self.encode(before), self.encode(before + text)
        return whole[len(head) :] if whole[: len(head)] == head else self.encode_within(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        return decode(self._tokenizer, ids)

    def lost_bytes(self, text: str) -> int:
        """The number of bytes of a text that its ids do not give back."""
        return lost_bytes(text, self.decode(self.encode(text)))

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"'{self.name}' has no tokenizer, so text cannot be read; give --tokenizer, or token ids")
        return self.tokenizer


def load_model(
    path: str | Path,
    tokenizer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> LanguageModel:
    """Reads a checkpoint of any kind.

    Weights are read one by one, as views of their file where possible: memory never holds a second copy of the model.
    Nothing in a checkpoint is run.

    Args:
        path: The folder of a run or of a branch (the last checkpoint counts); a training checkpoint, one file or
            sharded; our inference folder; a Hugging Face LLaDA or Llama folder.
        tokenizer: The tokenizer to use instead of the checkpoint's: a ``tokenizer.json``, a folder with one, a name on
            the hub.
        device: The device; None: CUDA's where there is one, else the CPU.
        dtype: The type of the weights, such as `bfloat16`; None: as stored.

    Raises:
        UserError: The path holds no checkpoint, or one that is not whole, of another architecture, or of a tokenizer
            that is not the model's; there is no such device or type.
    """
    wanted, place = dtype_named(dtype), _device_named(device)
    stored = open_checkpoint(path, tokenizer)
    description, files = stored.description, stored.tokenizer
    wanted = wanted or common_dtype(stored.weights.values())
    with torch.device("meta"):
        model = description.transformer()
    for name, weight in stored.weights.items():
        module, _, leaf = name.rpartition(".")
        value = weight.read().to(device=place, dtype=wanted)
        setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    return LanguageModel(
        objective=description.objective,
        model=model.eval(),
        mask_token_id=description.mask_token_id,
        eos_token_id=description.eos_token_id,
        context_length=description.context_length,
        tokenizer=None if files is None else files.tokenizer,
        end_token_ids=stored.end_token_ids,
        start_token_id=description.start_token_id,
        text_prefix_ids=stored.text_prefix_ids,
        compat=description.compat,
        block_length=description.block_length,
        shift_targets=description.shift_targets,
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
