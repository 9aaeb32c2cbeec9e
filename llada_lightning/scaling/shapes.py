"""Shapes: the Transformer's dimensions, their parameter counts, and the names they go by.

A shape holds no vocabulary: the same shape is trained with any tokenizer. Parameter arithmetic stands here and
nowhere else; the model is checked against it by a test.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from llada_lightning.errors import UserError


@dataclass(frozen=True)
class Shape:
    """The dimensions of the Transformer.

    Args:
        n_layers: number of blocks.
        d_model: width of the residual stream.
        n_heads: attention heads; each has ``d_model / n_heads`` dimensions.
        n_kv_heads: key/value heads; fewer than ``n_heads`` is grouped-query attention.
        d_ff: inner width of SwiGLU.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"shape: {field} is {value!r}; it must be a whole number of at least 1")
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise UserError(
                f"shape: d_model {self.d_model} over n_heads {self.n_heads} must give a whole, even head "
                "dimension; change n_heads or d_model"
            )
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"shape: n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def params_nonembedding(self) -> int:
        """N: every parameter but the embedding and the output head (paper, Table 5 and B.2)."""
        kv_width = self.n_kv_heads * self.head_dim
        attention = 2 * self.d_model * self.d_model + 2 * self.d_model * kv_width
        feed_forward = 3 * self.d_model * self.d_ff
        norms = 2 * self.d_model
        return self.n_layers * (attention + feed_forward + norms) + self.d_model

    def params_total(self, vocab_size: int) -> int:
        """N plus the embedding and the (untied) output head for ``vocab_size`` tokens."""
        return self.params_nonembedding + 2 * vocab_size * self.d_model


PAPER_VOCAB_SIZE = 126_464
"""Vocabulary of the four models of Table 5."""

PAPER_SHAPES = {
    "arm-1b": Shape(n_layers=22, d_model=2048, n_heads=32, n_kv_heads=4, d_ff=5634),
    "llada-1b": Shape(n_layers=22, d_model=2048, n_heads=32, n_kv_heads=4, d_ff=5634),
    "arm-7b": Shape(n_layers=28, d_model=4096, n_heads=32, n_kv_heads=8, d_ff=13_440),
    "llada-8b": Shape(n_layers=32, d_model=4096, n_heads=32, n_kv_heads=32, d_ff=12_288),
}
"""The paper's models (Table 5)."""

_LADDER_DEPTH_WIDTH = (
    (2, 64), (4, 64), (4, 96), (4, 128), (6, 128), (6, 192), (6, 256), (8, 256), (8, 320), (8, 384), (8, 512),
    (12, 512), (12, 640), (12, 768), (14, 896), (16, 1024), (20, 1152), (20, 1280), (24, 1408), (24, 1536),
    (24, 1792), (24, 2048), (28, 2304), (26, 2560),
)  # fmt: skip
"""Depth and width of the ladder, smallest first. Width over depth rises from about 30 for the smallest rungs through
64, as GPT-2 small (Radford et al. 2019), to about 100, as the 1B models of Table 5."""


def swiglu_width(d_model: int, multiple: int = 64) -> int:
    """8/3 of the width, the inner width at which SwiGLU costs what a 4x MLP does (Shazeer 2020), rounded up."""
    return -(-8 * d_model // (3 * multiple)) * multiple


def ladder_shape(n_layers: int, d_model: int) -> Shape:
    """A rung of given depth and width: multi-head attention with heads of 64 (32 below width 256), SwiGLU at 8/3."""
    n_heads = d_model // (64 if d_model >= 256 else 32)
    return Shape(n_layers, d_model, n_heads, n_heads, swiglu_width(d_model))


def format_count(count: float) -> str:
    """A count with three significant digits and a unit: 98.6k, 1.19m, 2.04b."""
    for unit, size in (("b", 1e9), ("m", 1e6), ("k", 1e3)):
        if count >= size * 0.9995:
            return f"{float(f'{count / size:.3g}'):g}{unit}"
    return f"{count:g}"


@cache
def ladder() -> dict[str, Shape]:
    """The ladder from about 0.1M to 2B non-embedding parameters; each name states the rung's true count."""
    shapes = [ladder_shape(n_layers, d_model) for n_layers, d_model in _LADDER_DEPTH_WIDTH]
    return {format_count(shape.params_nonembedding): shape for shape in shapes}


def named_shapes() -> dict[str, Shape]:
    """All shapes that go by a name: the paper's and the ladder's."""
    return {**PAPER_SHAPES, **ladder()}


def get_shape(spec: str | dict[str, Any] | Shape) -> Shape:
    """The shape of a name, or of its five dimensions.

    Raises:
        UserError: the name is unknown, or the dimensions do not make a shape.
    """
    if isinstance(spec, Shape):
        return spec
    if isinstance(spec, dict):
        missing = sorted(set(Shape.__dataclass_fields__) ^ set(spec))
        if missing:
            raise UserError(f"shape: {missing} missing or unknown; a shape has {list(Shape.__dataclass_fields__)}")
        return Shape(**spec)
    shapes = named_shapes()
    if spec not in shapes:
        raise UserError(f"shape: '{spec}' is not known; choose from {', '.join(shapes)}, or give its dimensions")
    return shapes[spec]


def shape_name(shape: Shape) -> str:
    """The ladder's or paper's name of a shape, else its dimensions: ``L2-d64-h2-kv2-ff192``."""
    for name, known in {**ladder(), **PAPER_SHAPES}.items():
        if known == shape:
            return name
    return f"L{shape.n_layers}-d{shape.d_model}-h{shape.n_heads}-kv{shape.n_kv_heads}-ff{shape.d_ff}"
