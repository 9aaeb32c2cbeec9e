"""The names that each layout gives to the weights of our Transformer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names its weights.

    Args:
        title: for people.
        whole_model: our names -> theirs, without `.weight`, of what is there once.
        block: likewise, within a block.
        blocks: what stands before a block's number.
        ignored: ends of names that hold no weights, such as tables that follow from the configuration.
    """

    title: str
    whole_model: dict[str, str]
    block: dict[str, str]
    blocks: str
    ignored: tuple[str, ...] = field(default=())

    def names(self, n_layers: int) -> dict[str, str]:
        """Our name -> theirs of each weight of a model, in the model's order."""
        embedding, *last = self.whole_model.items()
        blocks = [
            (f"blocks.{i}.{ours}", f"{self.blocks}.{i}.{theirs}")
            for i in range(n_layers)
            for ours, theirs in self.block.items()
        ]
        return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in [embedding, *blocks, *last]}


_WHOLE_MODEL = ("embedding", "norm", "head")
_BLOCK = (
    "attention_norm",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.out_proj",
    "feed_forward_norm",
    "feed_forward.gate_proj",
    "feed_forward.up_proj",
    "feed_forward.down_proj",
)

OURS = Layout("llada-lightning", {name: name for name in _WHOLE_MODEL}, {name: name for name in _BLOCK}, "blocks")

TRAINING = Layout(
    "training checkpoint",
    {name: f"model.{name}" for name in _WHOLE_MODEL},
    {name: name for name in _BLOCK},
    "model.blocks",
)

HF_LLADA = Layout(
    "Hugging Face LLaDA",
    {
        "embedding": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
    },
    {
        "attention_norm": "attn_norm",
        "attention.q_proj": "q_proj",
        "attention.k_proj": "k_proj",
        "attention.v_proj": "v_proj",
        "attention.out_proj": "attn_out",
        "feed_forward_norm": "ff_norm",
        "feed_forward.gate_proj": "ff_proj",  # theirs: ff_out(silu(ff_proj(x)) * up_proj(x))
        "feed_forward.up_proj": "up_proj",
        "feed_forward.down_proj": "ff_out",
    },
    "model.transformer.blocks",
)

HF_LLAMA = Layout(
    "Hugging Face Llama",
    {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    {
        "attention_norm": "input_layernorm",
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.out_proj": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate_proj": "mlp.gate_proj",
        "feed_forward.up_proj": "mlp.up_proj",
        "feed_forward.down_proj": "mlp.down_proj",
    },
    "model.layers",
    ignored=("rotary_emb.inv_freq",),
)
