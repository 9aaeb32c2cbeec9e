"""Shapes: the Transformer's dimensions, their parameter counts, and the names they go by.

A shape holds no vocabulary: the same shape is trained with any tokenizer. Parameter arithmetic is here and
nowhere else; the model is checked against it by a test.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened

MAX_LAYERS = 10_000
"""Most blocks: a hundred times those of the deepest language models."""
MAX_WIDTH = 2**20
"""Largest width, so that 64 bits count the bytes of every matrix."""
MAX_VOCABULARY = 2**24
"""Largest vocabulary: sixty times the largest in use."""
MAX_PARAMETERS = 10**14
"""Far above any model, and more than any machine's memory holds."""


def check_vocabulary(name: str, vocab_size: int) -> None:
    """Refuse a vocabulary that no model has.

    Args:
        name: The name of the setting, for messages.
        vocab_size: Number of entries of the embedding and the head.

    Raises:
        UserError: There are fewer than one, or too many.
    """
    if not 1 <= vocab_size <= MAX_VOCABULARY:
        raise UserError(f"{name}: {vocab_size} given; it must lie between 1 and {MAX_VOCABULARY}")


@dataclass(frozen=True)
class Shape:
    """The dimensions of the Transformer.

    Args:
        n_layers: The number of blocks.
        d_model: The width of the residual stream.
        n_heads: The number of attention heads; each has ``d_model / n_heads`` dimensions.
        n_kv_heads: The number of key/value heads; fewer than ``n_heads`` is grouped-query attention.
        d_ff: The inner width of SwiGLU.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"shape: {field} is {value!r:.80}; it must be a whole number of at least 1")
            most = MAX_LAYERS if field == "n_layers" else MAX_WIDTH
            if value > most:
                raise UserError(f"shape: {field} is {shortened(value, 40)}; it must be at most {most}")
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
    def depth_by_width(self) -> str:
        """Blocks x width, as tables print a shape: ``2x64``."""
        return f"{self.n_layers}x{self.d_model}"

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

PAPER_SEQUENCE_LENGTH = 4096
"""Sequence length of the paper's pre-training (Sec. 2.2)."""

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
    """A shape of given depth and width: multi-head attention with heads of 64 (32 below width 256), SwiGLU at 8/3."""
    n_heads = d_model // (64 if d_model >= 256 else 32)
    return Shape(n_layers, d_model, n_heads, n_heads, swiglu_width(d_model))


ASPECT_WIDTH_OVER_DEPTH = 64.0
ASPECT_PARAMS = 85e6
ASPECT_EXPONENT = 0.1
"""The rule for width over depth: 64 at 85M, as GPT-2 small (12 blocks of 768; Radford et al. 2019), growing by the
tenth root of N: 82 at 1B (Table 5: 93) and 99 at 7B (Table 5: 128). Kaplan et al. 2020, Fig. 5: at fixed N the loss
varies by a few per cent over an order of magnitude of this ratio."""

_MAX_WIDTH = 8192


def _keeps_aspect(shape: Shape) -> bool:
    """Whether width over depth is near the rule: by a factor of 1.2, and of 1.5 (2.2) where fewer shapes are to be had,
    below 300M (1M)."""
    count = shape.params_nonembedding
    rule = ASPECT_WIDTH_OVER_DEPTH * (count / ASPECT_PARAMS) ** ASPECT_EXPONENT
    ratio = shape.d_model / shape.n_layers / rule
    return max(ratio, 1 / ratio) <= (1.2 if count > 300e6 else 1.5 if count > 1e6 else 2.2)


@cache
def proposable_shapes() -> tuple[Shape, ...]:
    """Every shape that :func:`propose_shape` may give, by rising N, from 16 thousand to 67 billion.

    Dimensions that kernels like: width a multiple of 64 (32 below 256, 128 above 1024, 256 above 2048), heads of 64
    (32 below width 256, 128 from 2048), SwiGLU at 8/3 of the width rounded up to a multiple of 64 (256 above width
    1024). Below width 576 one multiple of 64 more or less is allowed too: whole blocks are steps of 10 % there.
    """
    widths = [*range(32, 256, 32), *range(256, 1024, 64), *range(1024, 2048, 128), *range(2048, _MAX_WIDTH + 1, 256)]
    shapes = []
    for width in widths:
        n_heads = width // (32 if width < 256 else 64 if width < 2048 else 128)
        inner = swiglu_width(width, 64 if width <= 1024 else 256)
        for d_ff in (inner, inner - 64, inner + 64) if 96 <= width < 576 else (inner,):
            for n_layers in range(1, 1 + 2 * math.ceil(width / 16)):
                shape = Shape(n_layers, width, n_heads, n_heads, d_ff)
                if _keeps_aspect(shape):
                    shapes.append(shape)
    return tuple(sorted(shapes, key=lambda shape: shape.params_nonembedding))


def propose_shape(params_nonembedding: float) -> Shape:
    """A good shape for a size: of :func:`proposable_shapes` the one whose N is nearest, within 6 % above 1M.

    A larger size never gets a smaller shape.

    Args:
        params_nonembedding: N that is wished for.

    Raises:
        UserError: The size lies outside of what is proposed.
    """
    shapes = proposable_shapes()
    least, most = shapes[0].params_nonembedding, shapes[-1].params_nonembedding
    if not 0.8 * least <= params_nonembedding <= 1.2 * most:
        raise UserError(
            f"shape: {params_nonembedding:g} parameters are outside of what is proposed, {format_count(least)} to "
            f"{format_count(most)}; give the dimensions yourself"
        )
    above = bisect_left(shapes, params_nonembedding, key=lambda shape: shape.params_nonembedding)
    neighbours = shapes[max(0, above - 1) : above + 1]
    return min(neighbours, key=lambda shape: abs(math.log(shape.params_nonembedding / params_nonembedding)))


def format_count(count: float) -> str:
    """A count with three significant digits and a unit: 98.6k, 1.19m, 2.04b."""
    for unit, size in (("b", 1e9), ("m", 1e6), ("k", 1e3)):
        if count >= size * 0.9995:
            return f"{float(f'{count / size:.3g}'):g}{unit}"
    return f"{count:g}"


@cache
def ladder() -> dict[str, Shape]:
    """The ladder from about 0.1M to 2B non-embedding parameters; each name states the true count of its parameters."""
    shapes = [ladder_shape(n_layers, d_model) for n_layers, d_model in _LADDER_DEPTH_WIDTH]
    return {format_count(shape.params_nonembedding): shape for shape in shapes}


def named_shapes() -> dict[str, Shape]:
    """All shapes that go by a name: the paper's and the ladder's."""
    return {**PAPER_SHAPES, **ladder()}


_DIMENSIONS = re.compile(r"L(\d+)-d(\d+)-h(\d+)-kv(\d+)-ff(\d+)", re.ASCII)


def get_shape(spec: str | dict[str, Any] | Shape) -> Shape:
    """The shape of a name, or of its five dimensions: a mapping, or one word as :func:`shape_name` writes it.

    Raises:
        UserError: The name is unknown, or the dimensions do not make a shape.
    """
    if isinstance(spec, Shape):
        return spec
    if isinstance(spec, dict):
        missing = sorted(set(Shape.__dataclass_fields__) ^ set(spec))
        if missing:
            raise UserError(f"shape: {missing} missing or unknown; a shape has {list(Shape.__dataclass_fields__)}")
        return Shape(**spec)
    shapes = named_shapes()
    if spec in shapes:
        return shapes[spec]
    if dimensions := _DIMENSIONS.fullmatch(spec):
        return Shape(*map(int, dimensions.groups()))
    raise UserError(
        f"shape: '{spec}' is not known; choose from {', '.join(shapes)}, or give its dimensions, such as "
        "L2-d64-h2-kv2-ff192"
    )


def shape_name(shape: Shape) -> str:
    """The ladder's or paper's name of a shape, else its dimensions: ``L2-d64-h2-kv2-ff192``."""
    for name, known in {**ladder(), **PAPER_SHAPES}.items():
        if known == shape:
            return name
    return f"L{shape.n_layers}-d{shape.d_model}-h{shape.n_heads}-kv{shape.n_kv_heads}-ff{shape.d_ff}"
