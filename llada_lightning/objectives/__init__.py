"""The table of objectives: what the package knows of each of them without torch.

An objective is one row here, one file with its loss beside this one, and one LightningModule class of a few lines in
`training/modules.py`. Everything else asks the row and never compares a name. `docs/extending.md` adds one, from
definition to curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Literal

from llada_lightning.compute.flops import (
    Convention,
    TrainingFlops,
    block_flops_per_token,
    expected_mask_probability,
    flops_per_token,
)
from llada_lightning.compute.shapes import Shape
from llada_lightning.support.errors import UserError

BLOCK_LENGTH = 16
"""The number of tokens of a block where none is given."""

ValidationKind = Literal["exact", "bound"]
TrainingKind = Literal["exact", "bound", "surrogate"]
"""What the expectation of a training loss is: the negative log-likelihood, its bound, or neither."""


@dataclass(frozen=True)
class Objective:
    """What is known of a training objective without torch.

    Args:
        name: The name in configurations, tables, file names and plots, such as `llada`.
        label: The name in the legend of a plot, which says of what kind the loss is.
        colour: The colour in a plot, such as `#0072B2`.
        line: The style of a line in a plot, as Matplotlib writes it.
        marker: The marker in a plot, as Matplotlib writes it.
        filled: Whether the marker is filled.
        module: The class path of the LightningModule.
        val_kind: Whether the validation loss is the exact negative log-likelihood, or an upper bound on it.
        causal: Whether a position attends to earlier positions only. It halves the FLOPs of attention.
        masks: Whether the inputs contain [MASK], so that the vocabulary must have it, and the likelihood of a
            continuation is the bound of Eq. 6.
        starts_with_eos: Whether an EOS is put before every sequence, so that the first token is predicted, too.
        logit_share: A function of the smallest mask probability that gives the expected share of the positions whose
            logits the training loss needs. Where it takes a second argument, that is the mean mask ratio of the data.
        tokens_per_param: The tokens per non-embedding parameter at the centre of an IsoFLOP grid.
        in_blocks: Whether a sequence is predicted block by block, each with a mask ratio of its own.
        replaces: Whether the inputs contain random tokens in place of some, and no [MASK]. Then the likelihood of a
            continuation is the bound of ``objectives.uniform``.
        layouts: The kinds of Hugging Face checkpoints that a model of this objective can be converted to.
        max_epochs: The number of passes over the data up to which repeated data is about as good as new data; None:
            not known.
        lr_scale: The factor of the rule's learning rate that our own studies found best; 1: none was looked for.
        lr_scale_source: Where that was found.
        multipliers: Measured compute multipliers against :data:`REFERENCE`, by the convention of FLOPs: the FLOPs of
            this objective, the multiplier, and where it was read off. Each is the smallest of its study.
    """

    name: str
    label: str
    colour: str
    line: Literal["-", "--", "-.", ":"]
    marker: str
    filled: bool
    module: str
    val_kind: ValidationKind
    causal: bool
    masks: bool
    starts_with_eos: bool
    logit_share: Callable[..., float]
    tokens_per_param: float
    in_blocks: bool = False
    replaces: bool = False
    layouts: tuple[str, ...] = ()
    max_epochs: float | None = None
    lr_scale: float = 1.0
    lr_scale_source: str = ""
    multipliers: Mapping[Convention, tuple[tuple[float, float, str], ...]] = field(default_factory=dict)

    @property
    def denoises(self) -> bool:
        """Whether a forward process corrupts the inputs, and answers are denoised; else they grow from left to right,
        and likelihoods are exact."""
        return self.masks or self.replaces

    def flops_per_token(
        self,
        shape: Shape,
        vocab_size: int,
        sequence_length: int,
        mask_eps: float,
        response_share: float = 1.0,
        mean_ratio: float | None = None,
        block_length: int | None = None,
    ) -> TrainingFlops:
        """The expected training FLOPs of one token, by the three counts of ``compute.flops``.

        Args:
            shape: The dimensions of the Transformer.
            vocab_size: The width of the output head.
            sequence_length: The number of positions that a token attends to, before the causal half.
            mask_eps: The smallest mask probability.
            response_share: The share of the tokens that the forward process may mask.
            mean_ratio: The mean of the mask ratio; None: that of the uniform density.
            block_length: The number of tokens of a block, of an objective that predicts in blocks.
        """
        # An objective that masks by a rule of its own has a share that the density of the data does not change.
        by_ratio = mean_ratio is not None and len(signature(self.logit_share).parameters) > 1
        share = self.logit_share(mask_eps, mean_ratio) if by_ratio else self.logit_share(mask_eps)
        share *= response_share if self.masks else 1.0
        if self.in_blocks:
            return block_flops_per_token(shape, vocab_size, sequence_length, block_length or BLOCK_LENGTH, share)
        return flops_per_token(shape, vocab_size, sequence_length, causal=self.causal, logit_share=share)


OBJECTIVES: dict[str, Objective] = {
    "arm": Objective(
        name="arm",
        label="arm (exact)",
        colour="#0072B2",
        line="-",
        marker="o",
        filled=True,
        module="llada_lightning.training.modules.ArmModule",
        val_kind="exact",
        causal=True,
        masks=False,
        starts_with_eos=True,
        logit_share=lambda mask_eps: 1.0,
        tokens_per_param=25.0,
        layouts=("hf-llama",),
        max_epochs=4.0,  # Muennighoff et al. 2023
    ),
    "llada": Objective(
        name="llada",
        label="llada (bound, NELBO)",
        colour="#D55E00",
        line="--",
        marker="s",
        filled=False,
        module="llada_lightning.training.modules.LladaModule",
        val_kind="bound",
        causal=False,
        masks=True,
        starts_with_eos=False,
        logit_share=expected_mask_probability,
        tokens_per_param=105.0,
        layouts=("hf-llada",),
        lr_scale=0.3,
        lr_scale_source="in both of our studies (0.31 on the H100, 0.25 to 0.5 on two cores; docs/study.md)",
        multipliers={
            "6nd": (
                (5e13, 38, "docs/study.md, H100, 6ND, at 5e13 FLOPs of llada"),
                (6e19, 20, "the published table, 6ND, at 6e19 FLOPs of llada"),
            ),
            "total": ((1.4e14, 20, "docs/study.md, H100, 6ND + attention + head, at 1.4e14 FLOPs of llada"),),
        },
    ),
    "block": Objective(
        name="block",
        label="block (bound, NELBO)",
        colour="#009E73",
        line="-.",
        marker="D",
        filled=False,
        module="llada_lightning.training.modules.BlockDiffusionModule",
        val_kind="bound",
        causal=False,
        masks=True,
        starts_with_eos=False,
        logit_share=expected_mask_probability,
        tokens_per_param=105.0,
        in_blocks=True,
    ),
    "uniform": Objective(
        name="uniform",
        label="uniform (bound, NELBO)",
        colour="#CC79A7",
        line=":",
        marker="^",
        filled=False,
        module="llada_lightning.training.modules.UniformDiffusionModule",
        val_kind="bound",
        causal=False,
        masks=False,
        starts_with_eos=False,
        logit_share=lambda mask_eps: 1.0,  # the bound sums over all positions
        tokens_per_param=105.0,
        replaces=True,
    ),
}
"""The objectives by their names, in the order in which plots and tables list them. The centres of `block` and `uniform`
are that of `llada`; their own have not been measured.

``tokens_per_param`` comes from published IsoFLOP losses (133 runs on C4, 3e18 to 3e20 FLOPs,
github.com/chen-hao-chao/mdm-prime-v2; parabolas in ln N at each of seven budgets). The N that is printed there is
nominal, 12 x layers x width^2, and leaves out the third matrix of SwiGLU. The true N is 4/3 of it, so that the true
ratios are 3/4 of the nominal 34 (`arm`, 26 to 41 over the budgets) and 143 (`llada`, 93 to 176; geometric means), 26
and 107. Both fall slightly with the budget and are rounded down for that. Hoffmann et al. 2022 found 20 for `arm`,
embeddings counted. A grid of five shapes covers a factor of 9 to either side."""

COMPARED = ("arm", "llada")
"""The objectives that a plan compares unless others are named: those of the paper."""

REFERENCE = "arm"
"""The objective that a compute multiplier divides by, unless another one is named."""


def register(objective: Objective) -> None:
    """Add an objective to the table.

    Raises:
        UserError: The table has another objective of this name.
    """
    if OBJECTIVES.get(objective.name, objective) != objective:
        raise UserError(f"objective: '{objective.name}' is in the table already; choose another name")
    OBJECTIVES[objective.name] = objective


def get_objective(name: str) -> Objective:
    """The objective of a name.

    Raises:
        UserError: The table has none of this name; the message lists the names.
    """
    if name not in OBJECTIVES:
        raise UserError(
            f"objective: '{name}' is not known; choose from {', '.join(OBJECTIVES)}, or name the module that registers "
            "it in LLADA_PLUGINS"
        )
    return OBJECTIVES[name]
