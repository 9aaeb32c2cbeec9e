"""Published numbers that a study can be held against. Sources, and what is not known of them: README.md beside."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pandas as pd

from llada_lightning.compute.flops import attention_flops_per_token, head_flops_per_token
from llada_lightning.compute.shapes import PAPER_SEQUENCE_LENGTH, PAPER_SHAPES, PAPER_VOCAB_SIZE
from llada_lightning.objectives import get_objective
from llada_lightning.records import DONE
from llada_lightning.study.results import table_of_records

PAPER_TASKS = {
    "mmlu": "MMLU", "cmmlu": "CMMLU", "arc_c": "ARC-C", "piqa": "PIQA", "gsm8k": "GSM8K", "humaneval": "HumanEval",
}  # fmt: skip
"""The six tasks of Tables 18 and 19: the name in our columns, and as printed."""


def paper_scalability() -> pd.DataFrame:
    """The checkpoints of the paper's Figure 3: Tables 19 (ARM) and 18 (LLaDA), a row each.

    Returns:
        ``model`` (as printed), ``objective``, ``shape`` (a name of ``PAPER_SHAPES``), ``params_nonembedding`` (of that
        shape; Table 5 prints three digits), ``tokens``, ``flops_6nd`` (as printed), ``flops_attention``,
        ``flops_head``, ``flops_total`` (ours: see below), and for each task ``task_<name>``, the score in percent,
        missing where the paper prints a dash. Counts are floats: 6ND overflows a 64-bit integer. ARM comes first.

    The paper counts 6ND only. Attention and head are computed by ``compute.flops`` from the shapes of Table 5 at length
    4096 and 126 464 vocabulary entries, with logits at every position: the paper does not say whether LLaDA's were
    computed at masked positions only, which would halve its head. The 1 % of LLaDA's sequences that were shorter are
    counted as whole ones.
    """
    tables = [_printed("table19.csv", "arm"), _printed("table18.csv", "llada")]
    return pd.concat(tables, ignore_index=True)


def _printed(file: str, objective: str) -> pd.DataFrame:
    printed = pd.read_csv(str(files(__name__) / file), na_values=["-"])
    shapes = printed["Model"].str.lower().str.replace(" ", "-")
    tokens = printed["Training Tokens"].str.removesuffix("B").astype(float) * 1e9
    causal, sizes = get_objective(objective).causal, [PAPER_SHAPES[shape] for shape in shapes]
    attention = [attention_flops_per_token(size, PAPER_SEQUENCE_LENGTH, causal=causal) for size in sizes]
    head = [head_flops_per_token(size, PAPER_VOCAB_SIZE) for size in sizes]
    table = pd.DataFrame({
        "model": printed["Model"].astype("string"),
        "objective": pd.Series(objective, printed.index, "string"),
        "shape": shapes.astype("string"),
        "params_nonembedding": [float(PAPER_SHAPES[shape].params_nonembedding) for shape in shapes],
        "tokens": tokens.round(),
        "flops_6nd": printed["FLOPs"].astype(float),
        "flops_attention": attention * tokens,
        "flops_head": head * tokens,
    })  # fmt: skip
    table["flops_total"] = table[["flops_6nd", "flops_attention", "flops_head"]].sum(axis=1)
    return table.assign(**{f"task_{name}": printed[title].astype(float) for name, title in PAPER_TASKS.items()})


def published_isoflop() -> pd.DataFrame:
    """133 published losses of autoregressive and masked diffusion models at equal 6ND (Chao et al. 2026).

    Returns:
        A results table (types as ``read_results`` gives): objective, FLOPs, N, loss, and what the authors' training
        scripts set for all runs; ``tokens`` is FLOPs / (6 N). What is not published is missing: standard errors,
        seeds, all counts of FLOPs but 6ND. Run names and shapes are made up from the facts.

    N is the authors' nominal 12 · layers · width², which leaves out the third matrix of SwiGLU (README.md), and most
    budgets of a size are points along one training curve, not runs of their own.
    """
    printed = pd.read_csv(str(files(__name__) / "published_isoflop.csv"))
    return table_of_records([_published_record(*row) for row in printed.itertuples(index=False)])


def _published_record(objective: str, flops: float, params: int, loss: float) -> dict[str, Any]:
    shape = f"{params / 1e6:.0f}M"
    return {
        "run": f"{objective}-{shape}-{flops:.0e}flops",
        "objective": objective,
        "shape": shape,
        "params_nonembedding": params,
        "tokens": round(flops / (6 * params)),
        "sequence_length": 2048,
        "flops_6nd": flops,
        "lr": 2e-4,
        "schedule": "cosine",
        "warmup_steps": 1000,
        "tokenizer": "gpt2",
        "vocab_size": 50_257,
        "val_nats_per_token": loss,
        "val_kind": get_objective(objective).val_kind,
        "status": DONE,
    }
