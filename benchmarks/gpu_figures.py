"""The figures of `gpu_check.py`: what each is taken from, and what is to be reached; without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from step_sizes import EAGER, EVERYTHING, FLASH, FLEX, GRAPHED, LEAST_OF_ARM, MFU_AIMS, Size

GRAPH_AIMS = {"853k": 5.0, "2.66m": 5.0, "14.2m": 2.0}
"""Least milliseconds of a compiled step over those of a graphed one, by shape."""
MOST_WALL, LEAST_OF_BARE, MOST_LOSS = 20.0, 0.95, 1e-3
"""Most seconds of a fit with ten seconds of training; least rate of a fit over that of the bare loop; most nats between
the losses of a fit on one process and of a sharded one, in fp32."""

MEASURED = "measured"


class Missing(Exception):  # noqa: N818 (no error: a figure that there is not, and why)
    """A figure that there is not. The message says why."""


@dataclass
class Results:
    """What the parts have written, and why some did not write all of it.

    Attributes:
        written: by part.
        reasons: by part; none of a part that has ended by itself.
    """

    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def of(self, part: str, *keys: str) -> Any:
        """What a part has written under keys, one within the other.

        Raises:
            Missing: It did not, or it failed there.
        """
        value: Any = self.written.get(part, {})
        for key in keys:
            if key not in value:
                failed = value.get("status", MEASURED) != MEASURED
                raise Missing(value["status"]) if failed else self.missing(part)
            value = value[key]
        return value

    def row(self, part: str, rows: str, **values: Any) -> dict[str, Any]:
        """The row with these values of a list that a part has written.

        Raises:
            Missing: There is none, or nothing was measured there.
        """
        for row in self.of(part, rows):
            if all(row.get(key) == value for key, value in values.items()):
                if row.get("status", MEASURED) != MEASURED:
                    raise Missing(row["status"].removeprefix("missing: "))
                return row  # type: ignore[no-any-return]
        raise self.missing(part)

    def missing(self, part: str) -> Missing:
        """Why a part did not write something."""
        return Missing(self.reasons.get(part, f"not measured by the part '{part}'"))


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        find: The value, from the results of all parts; it raises Missing, or an error where something is not there.
        least, most: What is to be reached; None: no goal.
    """

    name: str
    unit: str
    find: Callable[[Results], float]
    least: float | None = None
    most: float | None = None

    @property
    def goal(self) -> str | None:
        """In words."""
        if self.least is not None:
            return f"at least {self.least:g}"
        return None if self.most is None else f"at most {self.most:g}"

    def met(self, value: float) -> bool | None:
        """Whether the goal is reached; None: there is none."""
        if self.least is not None:
            return value >= self.least
        return None if self.most is None else value <= self.most


# --- the figures of each part ----------------------------------------------------------------------------------------


def number(part: str, *keys: str) -> Callable[[Results], float]:
    """A number that a part has written under keys."""
    return lambda results: float(results.of(part, *keys))


def step(part: str, size: Size, variant: str, key: str, objective: str = "llada") -> Callable[[Results], float]:
    """A figure of a bare loop (`train_speed.py`)."""
    wanted = {"shape": size.shape, "objective": objective, "variant": variant}
    return lambda results: _known(results.row(part, "rows", **wanted), key)


def fit_rate(part: str, size: Size, graph: bool, key: str) -> Callable[[Results], float]:
    """A figure of a short fit (`fit_check.py`)."""
    wanted = {"shape": size.shape, "graph": str(graph).lower()}
    return lambda results: _known(results.row(part, "rates", **wanted), key)


def _known(row: dict[str, Any], key: str) -> float:
    if row.get(key) is None:
        raise Missing("the peak of this device is not known" if key == "mfu" else f"{key} was not written")
    return float(row[key])


def over(one: Callable[[Results], float], other: Callable[[Results], float]) -> Callable[[Results], float]:
    """The first figure over the second."""
    return lambda results: one(results) / other(results)


def thousand(one: Callable[[Results], float]) -> Callable[[Results], float]:
    """Seconds as milliseconds."""
    return lambda results: 1e3 * one(results)


def best(*figures: Callable[[Results], float]) -> Callable[[Results], float]:
    """The largest of those that there are; where there is none, the first one says why."""

    def find(results: Results) -> float:
        values, reasons = [], []
        for figure in figures:
            try:
                values.append(figure(results))
            except Missing as missing:
                reasons.append(missing)
        if not values:
            raise reasons[0]
        return max(values)

    return find


def step_figures(part: str, sizes: Sequence[Size], large: bool) -> Iterator[Figure]:
    """Of the bare loops: milliseconds, and where arithmetic limits them the MFU."""
    for size in sizes:
        for variant in (EAGER, EVERYTHING, GRAPHED):
            milliseconds = thousand(step(part, size, variant, "step_seconds"))
            yield Figure(f"{size.shape}: {LOOPS[variant]}", "ms a step", milliseconds)
        compiled, graphed = (step(part, size, variant, "step_seconds") for variant in (EVERYTHING, GRAPHED))
        least = GRAPH_AIMS.get(size.shape)
        yield Figure(f"{size.shape}: graphs over compiled", "times the speed", over(compiled, graphed), least)
        if large:
            llada, arm = (
                best(*(step(part, size, variant, "mfu", objective) for variant in (EVERYTHING, GRAPHED)))
                for objective in ("llada", "arm")
            )
            yield Figure(f"{size.shape}: `llada`, compiled or graphs", "MFU", llada, MFU_AIMS.get(size.shape))
            yield Figure(f"{size.shape}: `arm`, compiled or graphs", "MFU", arm)
            yield Figure(f"{size.shape}: `llada` over `arm`", "of the MFU", over(llada, arm), LEAST_OF_ARM)


LOOPS = {EAGER: "eager", EVERYTHING: "compiled", GRAPHED: "compiled, as graphs"}
"""The variants of a bare loop in the table."""


def rate_figures(part: str, steps: str, sizes: Sequence[Size], graphs: Sequence[bool]) -> Iterator[Figure]:
    """Of short fits with and without graphs, beside the bare loops of the part ``steps``."""
    for size in sizes:
        for graph in graphs:
            name, variant = ("fit with graphs", GRAPHED) if graph else ("fit without graphs", EVERYTHING)
            fit, bare = fit_rate(part, size, graph, "step_seconds"), step(steps, size, variant, "step_seconds")
            least = LEAST_OF_BARE if graph else None
            yield Figure(f"{size.shape}: {name}", "ms a step", thousand(fit))
            yield Figure(f"{size.shape}: {name} over its bare loop", "times the speed", over(bare, fit), least)
            if size.shape in MFU_AIMS:
                yield Figure(f"{size.shape}: {name}", "MFU", fit_rate(part, size, graph, "mfu"))


def fit_figures(part: str, steps: str, size: Size) -> Iterator[Figure]:
    """Of the two fits by part; the second one finds what the first one has compiled."""

    def of(key: str, which: int = 1) -> Callable[[Results], float]:
        return lambda results: float(_fits(results, part)[which][key])

    def seconds(name: str) -> Callable[[Results], float]:
        return lambda results: float(_fits(results, part)[1]["parts"][name])

    def ten(results: Results) -> float:
        return 10 + of("wall")(results) - of("training")(results)

    yield Figure(f"{size.shape}: first fit, whole", "s", of("wall", 0))
    yield Figure(f"{size.shape}: second fit, whole", "s", of("wall"))
    for name in FIT_PARTS:
        yield Figure(f"second fit: {name}", "s", seconds(name))
    yield Figure("second fit: all its steps at the rate that it logs in the end", "s", of("training"))
    yield Figure("second fit, had these taken 10 s", "s", ten, most=MOST_WALL)
    rate = over(of("tokens_per_second"), step(steps, size, EVERYTHING, "tokens_per_second"))
    yield Figure(f"{size.shape}: logged rate over bare compiled loop", "times the speed", rate)
    yield rows_that_differ(part, "twice", "repeated: logged rows that differ")


FIT_PARTS = (
    "interpreter, imports, settings",
    "data, model, optimizer",
    "first step, compiling",
    "other steps, their validations and checkpoints",
    "last validation of the fit, last checkpoint",
    "final validation",
    "record, end of process",
)
"""As ``fit_check.PARTS`` names them; that module needs torch."""


def _fits(results: Results, part: str) -> list[dict[str, Any]]:
    fits: list[dict[str, Any]] = results.of(part, "twice", "fits")
    if len(fits) < 2:
        raise results.missing(part)
    return fits


def rows_that_differ(part: str, action: str, name: str) -> Figure:
    """Of two runs that are to be equal to the last bit."""

    def find(results: Results) -> float:
        if not results.of(part, action, "rows"):
            raise Missing("no row was logged by both")
        return float(results.of(part, action, "rows_that_differ"))

    return Figure(name, "rows", find, most=0)


def sampler_figures(part: str, shapes: Sequence[str], batches: Sequence[int], block: int) -> Iterator[Figure]:
    """Each way over the released sampler's way of working."""
    ways = (f"blocks of {block}, as released", f"blocks of {block}")
    ways += tuple(f"blocks of {block}, {cache} cache" for cache in ("prefix", "dual")) if block == 32 else ()
    for shape in shapes:
        for batch in batches:

            def of(way: str, key: str, shape: str = shape, batch: int = batch) -> Callable[[Results], float]:
                wanted = {"model": f"random {shape}", "batch": batch, "way": way}
                return lambda results: float(results.row(part, "rows", **wanted)[key])

            start = f"{shape}, batch {batch}"
            yield Figure(f"{start}: released loop", "s", of(f"blocks of {block}, plain loop", "seconds"))
            for way in ways:
                yield Figure(f"{start}: {way}", "times its speed", of(way, "speed"))


def scoring_figures(part: str) -> Iterator[Figure]:
    """Requests a second over the released loop's."""

    def of(end: str, key: str) -> Callable[[Results], float]:
        def find(results: Results) -> float:
            [row] = (row for row in results.of(part, "steps") if row["name"].endswith(end))
            return float(row[key])

        return find

    yield Figure("released loop", "requests/s", of("released loop, 128 samples", "requests_per_second"))
    yield Figure("ours, 128 samples", "times its speed", of("ours, 128 samples", "ratio"))
    yield Figure("ours at equal error", "times its speed", of(": equal error", "ratio"))
    yield Figure("ranking settled at 0.99", "times its speed", number(part, "ranking", "ratio"))


def attention_figures(part: str, steps: str, size: Size) -> Iterator[Figure]:
    """Of other back ends than torch's own choice, over the compiled step of the part ``steps``."""
    for variant in (FLASH, FLEX):
        ratio = over(step(steps, size, EVERYTHING, "step_seconds"), step(part, size, variant, "step_seconds"))
        yield Figure(f"{size.shape}: {variant}", "ms a step", thousand(step(part, size, variant, "step_seconds")))
        yield Figure(f"{size.shape}: {variant} over sdpa", "times the speed", ratio)


def sharded_figures(part: str) -> Iterator[Figure]:
    """Of `fsdp2` on one process."""
    difference = number(part, "fsdp2", "loss_difference")
    yield Figure("fsdp2: largest difference of losses, fp32", "nats/token", difference, most=MOST_LOSS)


def suite_figures(part: str) -> Iterator[Figure]:
    """Of pytest. Without a failure they count once all tests have run."""

    def count(key: str) -> Callable[[Results], float]:
        def find(results: Results) -> float:
            seen = results.written.get(part, {})
            if part in results.reasons and not seen.get("failed"):
                raise Missing(results.reasons[part] + (f"; before: {json.dumps(seen)}" if seen else ""))
            return float(results.of(part, key))

        return find

    yield Figure("tests marked `gpu` that failed", "tests", count("failed"), most=0)
    yield Figure("that passed", "tests", count("passed"), least=1)
    yield Figure("that were skipped", "tests", count("skipped"))
