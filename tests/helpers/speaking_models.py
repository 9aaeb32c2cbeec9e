"""Small models with random weights that read and write text: byte-level BPE with the marks of a conversation."""

from __future__ import annotations

from functools import lru_cache

import torch
from tokenizers import AddedToken, Tokenizer

from llada_lightning.checkpoints import LanguageModel
from llada_lightning.compute.shapes import Shape
from llada_lightning.data.tokenizers import train_tokenizer
from llada_lightning.model import Transformer

BEGIN, HEADER, HEADER_END, TURN_END = "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""In the manner of Llama 3 and LLaDA 8B Instruct."""


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """About 300 words: all bytes, a few merges, [EOS], [MASK] and four marks."""
    made = train_tokenizer(["one two three four five six seven eight nine ten, and so on and on\n"] * 4, 300)
    made.add_special_tokens([AddedToken(t, special=True) for t in (BEGIN, HEADER, HEADER_END, TURN_END)])
    return made


def speaking_model(objective: str = "llada", context_length: int = 256, template: str | None = None) -> LanguageModel:
    """A model with a tokenizer, whose answers are noise."""
    words = tokenizer()
    model = Transformer(Shape(n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, d_ff=64), words.get_vocab_size())
    model.initialise(torch.Generator().manual_seed(0))
    eos = words.token_to_id("[EOS]")
    return LanguageModel(
        objective,
        model.eval(),
        words.token_to_id("[MASK]"),
        eos,
        context_length,
        tokenizer=words,
        end_token_ids=() if template is None else (words.token_to_id(TURN_END),),
        start_token_id=eos if objective == "arm" else None,
        chat_template=template,
        name="a small model",
    )
