"""The data module of supervised fine-tuning (paper, Sec. 2.3, App. B.1), which all objectives share."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cached_property
from typing import Any

import numpy as np
from rich.progress import track
from torch.utils.data import DataLoader

from llada_lightning.data import ROLES_NAME, TEMPLATE_NAME, TOKENIZER_NAME, TokenizerInfo
from llada_lightning.data.chat import LLADA_TEMPLATE, PLAIN_TEMPLATE, ChatTemplate
from llada_lightning.data.datasets import PairDataset, PairStream, PairValidationDataset
from llada_lightning.data.dialogues import Pairs, read_dialogues, tokenize_pairs
from llada_lightning.data.loading import LanguageDataModule
from llada_lightning.data.tokenizers import TokenizerFiles, load_tokenizer
from llada_lightning.objectives import noise
from llada_lightning.objectives.noise import Purpose
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import expanded
from llada_lightning.support.printing import people_console, warn_once
from llada_lightning.support.reading import read_text


class SftDataModule(LanguageDataModule):
    """Prompts with responses: only responses are masked and learned, each with the EOS behind it.

    A dialogue of n turns is n pairs, of which each visit draws one. Consecutive pairs are padded with EOS to the
    longest of them. Masked objectives learn that padding as part of the response; autoregression learns the first EOS
    only. Tokens, and so FLOPs, count prompts, responses and this padding, for every objective.

    Args:
        path: The .jsonl file, the folder of such files, or `hf:NAME[:CONFIG][@SPLIT]`. A row has prompt and response,
            question and answer, instruction (with input) and output, or messages of user and assistant by turns. It may
            also have a system message.
        tokenizer: The tokenizer.json, or a folder with one; null: the tokenizer of `model.weights`.
        chat_template: The template that turns messages into text: tokenizer (its own), llada, plain (roles as text), or
            a Jinja file; null: the tokenizer's own where it has one, else plain.
        context_length: The largest number of tokens of a pair; null: the context of `model.weights`.
        drop_long: Whether dialogues that exceed the context are left out instead of refused.
        epochs: The number of visits of each dialogue; null: a budget decides the length of the run.
        global_batch: The number of pairs of an optimizer step, exactly.
        pad_together: The number of consecutive pairs that are padded to the longest of them (paper: 2, the batch of a
            GPU).
        val_fraction: The share of the dialogues that is held out for validation.
        mask_token: The name of [MASK] in the tokenizer; null: that of `model.weights`, else the one that the
            tokenizer's files name, else a common name; '': none, which an objective without masks can do without.
        eos_token: The name of the token that ends a response, found in the same way.
        vocab_size: The size of the model's vocabulary: special tokens of the tokenizer with higher ids are left out;
            null: that of `model.weights`, else no limit.
        text_prefix_ids: The token ids before a dialogue in the plain template, such as the BOS of a Llama; null: those
            of `model.weights`, else none.
        loader: The other settings of :class:`LanguageDataModule`, by name.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        context_length: int | None = None,
        drop_long: bool = False,
        epochs: float | None = None,
        global_batch: int = 16,
        pad_together: int = 2,
        val_fraction: float = 0.02,
        mask_token: str | None = None,
        eos_token: str | None = None,
        vocab_size: int | None = None,
        text_prefix_ids: list[int] | None = None,
        **loader: Any,
    ) -> None:
        if tokenizer is None or context_length is None:
            missing = "tokenizer" if tokenizer is None else "context_length"
            raise UserError(f"data.{missing}: none given; give --model.weights CHECKPOINT, or --data.{missing}")
        super().__init__(sequence_length=context_length, global_batch=global_batch, **loader)
        if pad_together < 1:
            raise UserError(f"data.pad_together: {pad_together} must be at least 1")
        if not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction: {val_fraction} must lie between 0 and 1")
        if epochs is not None and not epochs > 0:
            raise UserError(f"data.epochs: {epochs} must be above 0")
        self.path, self._tokenizer_spec, self._template_spec = path, tokenizer, chat_template
        self.drop_long, self._epochs = drop_long, epochs
        self.pad_together, self.val_fraction = pad_together, val_fraction
        self.text_prefix_ids = text_prefix_ids
        self._loaded = load_tokenizer(
            tokenizer,
            mask_token=mask_token,
            eos_token=eos_token,
            need_mask=False,
            vocab_size=vocab_size,
            option="--data.{}_token",
        )

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self._loaded[1]

    def tokenizer_files(self) -> dict[str, str]:
        roles = {role: token or None for role, token in self.template.roles.items()}
        return {
            TOKENIZER_NAME: self._loaded[0].to_str(),
            TEMPLATE_NAME: self.template.text,
            ROLES_NAME: json.dumps(roles, indent=2, ensure_ascii=False) + "\n",
        }

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the run; a UserError where there is none, or its file cannot be read."""
        tokenizer, info = self._loaded
        files = TokenizerFiles.of_path(self._tokenizer_spec)
        own = files.chat_template
        spec = self._template_spec or ("plain" if own is None else "tokenizer")
        if spec == "tokenizer" and own is None:
            raise UserError(f"data.chat_template: tokenizer '{self._tokenizer_spec}' has none; choose plain or llada")
        if spec in ("tokenizer", "llada", "plain"):
            plain = self._written_prefix() + PLAIN_TEMPLATE
            text = {"tokenizer": own, "llada": LLADA_TEMPLATE, "plain": plain}[spec] or ""
        else:
            try:
                text = read_text(expanded(spec))
            except UserError as error:
                raise UserError(f"data.chat_template: {error}; give tokenizer, llada, plain or a file") from error
        acting = (info.mask_id, *(self.text_prefix_ids or ()))
        return ChatTemplate.of(text, tokenizer, info.eos_id, acting, spec, files.special_tokens)

    def _written_prefix(self) -> str:
        """The tokens before a text as Jinja: a part of the run's template, so that inference has them, too."""
        tokens = [self._loaded[0].id_to_token(token_id) for token_id in self.text_prefix_ids or ()]
        if None in tokens:
            raise UserError(
                f"data.text_prefix_ids: {self.text_prefix_ids} are not all in tokenizer '{self._tokenizer_spec}'; give "
                "ids of its tokens"
            )
        return "".join(f"{{{{ {json.dumps(token, ensure_ascii=False)} }}}}" for token in tokens)

    @cached_property
    def pairs(self) -> Pairs:
        """All pairs, read and tokenized once; a UserError where a row is not a dialogue or does not fit the model."""
        rows = track(
            read_dialogues(self.path),
            description="reading pairs",
            console=people_console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        pairs = tokenize_pairs(rows, self.template, self.tokenizer.eos_id, self.sequence_length, self.drop_long)
        if self.text_prefix_ids is not None and not pairs.prompts_P.all():
            raise UserError(
                f"data.chat_template: '{self.template.name}' writes nothing before an answer, and such a model begins "
                "with what it is given; write at least one token there"
            )
        if pairs.dropped:
            warn_once(
                f"note: {pairs.dropped} of {pairs.dropped + pairs.dialogues} dialogues are longer than the context of "
                f"{self.sequence_length} and are left out"
            )
        return pairs

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        """The numbers of the dialogues of ``train`` and of ``val``, chosen by ``val_seed``."""
        count = self.pairs.dialogues
        held = max(1, round(self.val_fraction * count))
        if self.val_sequences is not None:
            held = min(held, self.val_sequences)
        if held >= count:
            raise UserError(f"data.path: '{self.path}' has {count} dialogues; training and validation need one each")
        order = np.argsort(noise.random_words(self.val_seed, Purpose.HELD_OUT, 0, count), kind="stable")
        return {"val": np.sort(order[:held]), "train": np.sort(order[held:])}

    @cached_property
    def fingerprint(self) -> str:
        lines = [f"tokenizer {self.tokenizer.fingerprint}", f"pairs {self.pairs.fingerprint()}"]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def stream(self) -> PairStream:
        """The pairs in the order of training."""
        return PairStream(self.pairs, self.splits["train"], self.seed, self.pad_together)

    @cached_property
    def _epoch_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """The padded lengths of the first epoch's pairs, and the lengths of their prompts."""
        ordinals = np.arange(len(self.splits["train"]))
        return self.stream.padded_lengths(ordinals), self.pairs.prompts_P[self.stream.drawn(ordinals)]

    @property
    def tokens_per_sequence(self) -> float:
        return float(self._epoch_lengths[0].mean())

    @property
    def attended_length(self) -> int:
        lengths = self._epoch_lengths[0]
        return round(float((lengths**2).sum() / lengths.sum()))

    @property
    def response_share(self) -> float:
        lengths, prompts = self._epoch_lengths
        return 1 - float(prompts.sum() / lengths.sum())

    @property
    def wanted_steps(self) -> int | None:
        return None if self._epochs is None else max(1, round(self._epochs * len(self.splits["train"]) / self.batch))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes for each token of the responses that are held out, all turns of them."""
        val = np.concatenate([np.arange(*self.pairs.first_N[n : n + 2]) for n in self.splits["val"]])
        tokens = (self.pairs.lengths - self.pairs.prompts_P)[val]
        return float(self.pairs.bytes_P[val].sum() / tokens.sum())

    @property
    def lost_share(self) -> float:
        """The share of the bytes of all responses that their tokens do not decode to."""
        return float(self.pairs.lost_P.sum() / max(1, self.pairs.bytes_P.sum()))

    @property
    def val_documents(self) -> int:
        return len(self.splits["val"])

    def unique_tokens(self, steps: int) -> int:
        """The number of tokens, without padding, of the dialogues that are read; the mean over the turns of each."""
        read = min(1.0, self.epochs(steps))
        first = self.pairs.first_N
        means = np.add.reduceat(self.pairs.lengths, first[:-1]) / np.diff(first)
        return round(read * float(means[self.splits["train"]].sum()))

    def epochs(self, steps: int) -> float:
        return steps * self.batch / len(self.splits["train"])

    def check(self) -> None:
        assert self.splits

    def train_dataloader(self) -> DataLoader:
        return self._training_loader(
            PairDataset(
                self.stream,
                self.tokenizer.eos_id,
                self.mask_eps,
                self.time_sampling,
                self.batch,
                self.density,
                self.block_length,
            )
        )

    def val_dataloader(self) -> DataLoader:
        held = self.splits["val"]
        end, blocks = self.tokenizer.eos_id, self.block_length
        dataset = PairValidationDataset(self.pairs, held, self.val_seed, end, blocks)
        return self._validation_loader(dataset, len(held))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader
