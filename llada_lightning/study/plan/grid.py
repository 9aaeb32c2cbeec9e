"""Which shapes a study trains at each budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from llada_lightning.compute.flops import Convention
from llada_lightning.compute.shapes import Shape, get_shape, proposable_shapes, propose_shape, shape_name
from llada_lightning.objectives import get_objective
from llada_lightning.run import Stream
from llada_lightning.support.errors import UserError

GRID_STEP = math.sqrt(3)
GRID_ANCHOR = 85e6
"""The grid of sizes, 85M times powers of sqrt(3): a step is a factor of 3 in tokens per parameter at equal 6ND. One
grid for all budgets, objectives and plans, so that shapes come back and a trunk can serve several budgets."""

MIN_SHAPES = 3
"""A parabola has three coefficients."""


@dataclass(frozen=True)
class Grid:
    """How shapes are chosen: by default ``points`` sizes around each objective's centre.

    Args:
        points: The number of shapes at each budget.
        centres: The tokens per non-embedding parameter at the centre; by default as in the table of objectives.
        shapes: The names of exactly these shapes, at every budget.
        tokens_per_param: Exactly these ratios, at every budget and for all objectives.
    """

    points: int = 5
    centres: Mapping[str, float] = field(default_factory=dict)
    shapes: Sequence[str | Shape] = ()
    tokens_per_param: Sequence[float] = ()

    def centre(self, objective: str) -> float:
        """The tokens per non-embedding parameter at the centre of an objective."""
        return self.centres.get(objective, get_objective(objective).tokens_per_param)

    def check(self) -> None:
        """Refuse what is no grid.

        Raises:
            UserError: names the setting.
        """
        if self.shapes and self.tokens_per_param:
            raise UserError("plan: --shapes and --tokens-per-param are both given; give one of them")
        named = {"--tokens-per-param": tuple(self.tokens_per_param)}
        named |= {f"--centre-{objective}": (centre,) for objective, centre in self.centres.items()}
        for option, ratios in named.items():
            for ratio in ratios:
                if not (math.isfinite(ratio) and ratio > 0):
                    raise UserError(f"plan: {option} {ratio:g} must be a number above 0")
        if self.points < MIN_SHAPES:
            raise UserError(f"plan: --points {self.points} is below {MIN_SHAPES}, which a parabola needs")


@cache
def grid_shapes() -> tuple[Shape, ...]:
    """The shapes nearest to the sizes of the grid, by rising N, each once."""
    shapes = proposable_shapes()
    least, most = (math.log(end.params_nonembedding / GRID_ANCHOR, GRID_STEP) for end in (shapes[0], shapes[-1]))
    sizes = [GRID_ANCHOR * GRID_STEP**power for power in range(math.ceil(least), math.floor(most) + 1)]
    return tuple(dict.fromkeys(propose_shape(size) for size in sizes))


def shapes_at(budget: float, objective: str, grid: Grid, stream: Stream, convention: Convention) -> tuple[Shape, ...]:
    """The shapes that are trained with one budget, by rising N.

    Raises:
        UserError: fewer than three different ones.
    """

    def tokens_per_param(shape: Shape) -> float:
        tokens = budget / stream.flops_per_token(shape, get_objective(objective)).by(convention)
        return tokens / shape.params_nonembedding

    def distance(ratio: float) -> Callable[[Shape], float]:
        return lambda shape: abs(math.log(tokens_per_param(shape) / ratio))

    if grid.shapes:
        chosen = [get_shape(shape) for shape in grid.shapes]
    elif grid.tokens_per_param:
        chosen = [min(proposable_shapes(), key=distance(ratio)) for ratio in grid.tokens_per_param]
    else:
        chosen = sorted(grid_shapes(), key=distance(grid.centre(objective)))[: grid.points]
    different = sorted(set(chosen), key=lambda shape: shape.params_nonembedding)
    if len(different) < MIN_SHAPES:
        names = ", ".join(shape_name(shape) for shape in different)
        raise UserError(
            f"plan: {budget:g} FLOPs have {len(different)} shape(s) of {objective} ({names}), and a parabola needs "
            f"{MIN_SHAPES}; give more shapes, or other ratios or budgets"
        )
    return tuple(different)
