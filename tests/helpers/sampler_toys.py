"""Small models for the samplers' tests: a random Transformer, the authors' tiny one, and predictors that are exact."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn

from llada_lightning.checkpoints import LanguageModel
from llada_lightning.compute.shapes import Shape
from llada_lightning.model import Transformer

GOLDEN = Path(__file__).parents[1] / "model" / "golden_llada_mha"
WORDS, EOS, MASK = 24, 0, 1
SHAPE = Shape(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)


@cache
@torch.inference_mode(False)
def random_model(objective: str = "llada") -> LanguageModel:
    """Random weights, drawn wide: a prediction that is nearly flat could not tell one sampler from another.

    All tests share the model. So it is made in the ordinary mode, whichever test asks for it first.
    """
    model = Transformer(SHAPE, WORDS).eval()
    model.initialise(torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.head.weight *= 4
    start = EOS if objective == "arm" else None
    return LanguageModel(objective, model, MASK, EOS, context_length=128, start_token_id=start, name="random")  # type: ignore[arg-type]


@cache
def released_model() -> LanguageModel:
    """The authors' tiny model with random weights."""
    config = json.loads((GOLDEN / "config.json").read_text())
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "mlp_hidden_size")
    model = Transformer(Shape(*(config[name] for name in names)), config["vocab_size"], config["rope_theta"])
    ours = {"wte": "embedding", "ln_f": "norm", "ff_out": "head"}
    parts = {
        "attn_norm": "attention_norm", "q_proj": "attention.q_proj", "k_proj": "attention.k_proj",
        "v_proj": "attention.v_proj", "attn_out": "attention.out_proj", "ff_norm": "feed_forward_norm",
        "ff_proj": "feed_forward.gate_proj", "up_proj": "feed_forward.up_proj", "ff_out": "feed_forward.down_proj",
    }  # fmt: skip
    weights = {}
    for name, weight in load_file(GOLDEN / "model.safetensors").items():
        words = name.removeprefix("model.transformer.").split(".")
        in_block = words[0] == "blocks"
        weights[f"blocks.{words[1]}.{parts[words[2]]}.weight" if in_block else f"{ours[words[0]]}.weight"] = weight
    model.load_state_dict(weights)
    ids = {key: config[key] for key in ("mask_token_id", "eos_token_id")}
    return LanguageModel("llada", model.eval(), **ids, context_length=256, compat="llada", name="released")


class NoHead(nn.Module):
    """Gives back what it is given; its weight says where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, logits: Tensor) -> Tensor:
        return logits.clone()


class ToyPredictor(nn.Module):
    """Plays the Transformer: what is behind the head are log-probabilities already."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.vocab_size = words
        self.head = NoHead()

    def hidden(self, tokens_BL: Tensor, *, queries: slice = slice(None), **others: Any) -> Tensor:
        rows = list(map(tuple, tokens_BL.tolist()))
        known = {row: self.log_probabilities(list(row)) for row in set(rows)}
        return torch.stack([known[row] for row in rows])[:, queries].float()

    def log_probabilities(self, row: list[int]) -> Tensor:
        """(L, V) of one row."""
        raise NotImplementedError


class ExactPredictor(ToyPredictor):
    """p(word at i | what is unmasked) of a joint distribution over all texts of three tokens of three words.

    Words are 2, 3 and 4; 0 is EOS, 1 is [MASK].
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(5)
        generator = torch.Generator().manual_seed(seed)
        self.joint = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64) ** 3
        self.joint /= self.joint.sum()

    def log_probabilities(self, row: list[int]) -> Tensor:
        seen = self.joint.clone()
        for i, token in enumerate(row):
            if token != MASK:
                others = [word for word in range(3) if word != token - 2]
                seen.index_fill_(i, torch.tensor(others), 0.0)
        logs = torch.full((len(row), 5), -torch.inf, dtype=torch.float64)
        for i in range(len(row)):
            marginal = seen.sum(dim=[j for j in range(3) if j != i])
            logs[i, 2:] = (marginal / marginal.sum()).log()
        return logs

    def expected(self) -> dict[tuple[int, ...], float]:
        """Probability of each text."""
        return {tuple(w + 2 for w in words): float(self.joint[words]) for words in product(range(3), repeat=3)}


class ScriptedPredictor(ToyPredictor):
    """Gives each position of the answer the token and the confidence that a script says, whatever it sees."""

    def __init__(self, script: list[tuple[int, float]], prompt_length: int, words: int = 8) -> None:
        super().__init__(words)
        self.script, self.prompt_length = script, prompt_length

    def log_probabilities(self, row: list[int]) -> Tensor:
        p = torch.full((len(row), self.vocab_size), 1.0, dtype=torch.float64)
        for i, (token, share) in enumerate(self.script[: len(row) - self.prompt_length]):
            p[self.prompt_length + i] = (1 - share) / (self.vocab_size - 2)  # [MASK] has none
            p[self.prompt_length + i, token] = share
            p[self.prompt_length + i, MASK] *= token == MASK
        return p.log()


def toy(model: ToyPredictor, tokenizer: Tokenizer | None = None) -> LanguageModel:
    return LanguageModel("llada", model, MASK, EOS, 64, tokenizer=tokenizer, name="toy")  # type: ignore[arg-type]


def letters(words: int = 8) -> Tokenizer:
    """A tokenizer of one letter a token: a is 2, b is 3, …"""
    vocabulary = {"[EOS]": EOS, "[MASK]": MASK} | {chr(ord("a") + i): i + 2 for i in range(words - 2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], fuse_unk=False))
    tokenizer.add_special_tokens(["[EOS]", "[MASK]"])
    tokenizer.encode_special_tokens = True
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
