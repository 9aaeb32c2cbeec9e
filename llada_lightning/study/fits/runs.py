"""Which runs of a results table a fit may see: their losses, FLOPs and budgets, and how well the losses are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from llada_lightning.compute.flops import CONVENTIONS, Convention
from llada_lightning.objectives import OBJECTIVES, get_objective
from llada_lightning.records import DONE
from llada_lightning.study.fits.seeds import seed_scales
from llada_lightning.study.fits.uncertainty import Array, Noise
from llada_lightning.study.yardstick import yardstick_of
from llada_lightning.support.errors import UserError

Unit = Literal["nats_per_token", "bits_per_byte"]
UNITS: tuple[Unit, ...] = get_args(Unit)
UNIT_NAMES: dict[Unit, str] = {"nats_per_token": "nats/token", "bits_per_byte": "bits/byte"}

BUDGET_TOLERANCE = 1.1
"""Runs whose FLOPs differ by less than this factor belong to one budget: whole steps cannot hit it exactly."""


# --- objectives and their variants -----------------------------------------------------------------------------------


def named_variants(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with the variant in the name of the objective, such as `llada [weight_decay=0]`.

    So a variant is an objective of its own in every fit and figure, and rows that differ in it are never pooled.
    """
    if "variant" not in table or not (variants := table["variant"].fillna("").astype(object)).any():
        return table
    shown = variants.str.replace(r"(^|;)optimizer[.]", r"\1", regex=True)
    names = [
        f"{base_objective(name)} [{variant}]" if variant and not pd.isna(name) else name
        for name, variant in zip(table["objective"], shown, strict=True)
    ]
    return table.assign(objective=pd.Series(names, table.index, table["objective"].dtype))


def base_objective(name: str) -> str:
    """The objective of a name that may hold a variant: `llada` of `llada [weight_decay=0]`."""
    return name.partition(" [")[0]


def objective_names(table: pd.DataFrame) -> list[str]:
    """The names in a table, in the order of the table of objectives, each before its variants."""
    order = {name: number for number, name in enumerate(OBJECTIVES)}
    return sorted(
        table["objective"].dropna().unique(), key=lambda name: (order.get(base_objective(name), len(order)), name)
    )


# --- runs ------------------------------------------------------------------------------------------------------------


def usable_runs(table: pd.DataFrame) -> pd.DataFrame:
    """The finished runs with a finite loss, each once: the only ones that a fit may see.

    Their objectives are named as by ``named_variants``.
    """
    runs = named_variants(finished_runs(table))
    # A row repeats an earlier one, as in tables that were joined by hand, where all these are equal; where a table
    # gives no seeds, the loss must be equal too.
    key = runs[["objective", "run", "steps", "seed", "params_nonembedding", "tokens"]].astype(object)
    key = key.assign(loss=runs["val_nats_per_token"].where(runs["seed"].isna(), 0.0))
    return runs[~key.duplicated().to_numpy(bool)].reset_index(drop=True)


def finished_runs(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that are done with a finite loss."""
    finite = np.isfinite(table["val_nats_per_token"].to_numpy(float, na_value=np.nan))
    return table[(table["status"] == DONE).fillna(False).to_numpy(bool) & finite].reset_index(drop=True)


def check_comparable(table: pd.DataFrame) -> None:
    """Raises UserError where the losses of a table cannot be compared: of other data, or of other yardsticks."""
    yardstick = yardstick_of(table)
    for column in ("tokenizer", "data_fingerprint", "sequence_length"):
        kinds = sorted(table[column].dropna().unique())
        if len(kinds) > 1:
            raise UserError(f"results: {column} is mixed ({', '.join(map(str, kinds))}); collect runs on the same data")
    for objective, kind in table[["objective", "val_kind"]].drop_duplicates().itertuples(index=False):
        if pd.isna(objective) or base_objective(objective) not in OBJECTIVES:
            run = table.loc[table["objective"].eq(objective) | table["objective"].isna(), "run"].iloc[0]
            known = ", ".join(OBJECTIVES)
            raise UserError(f"results: objective {objective!r} of {run} is not known; it is one of {known}")
        own = get_objective(base_objective(objective)).val_kind if yardstick is None else "exact"
        if pd.isna(kind) or kind != own:
            raise UserError(f"results: val_kind of {objective} is {kind!r}; it must be {own!r}")


def check_complete(runs: pd.DataFrame, unit: Unit) -> None:
    """Raises UserError where a usable run lacks what every fit reads, or losses are what no training gives."""
    columns = ["params_nonembedding", "tokens", "val_nats_per_token"]
    if unit == "bits_per_byte":
        columns.append("val_bits_per_byte")
    for column in columns:
        wrong = ~_positive(runs[column])
        if wrong.any():
            name = runs.loc[wrong, "run"].iloc[0]
            remedy = "correct the table"
            if column == "val_bits_per_byte":
                remedy = "runs whose tokenizer does not give the text back have none; use --unit nats_per_token"
            raise UserError(f"results: {column} of {wrong.sum()} runs is missing or not positive ({name}); {remedy}")
    if (runs["val_stderr"] < 0).any():
        name = runs.loc[runs["val_stderr"] < 0, "run"].iloc[0]
        raise UserError(f"results: val_stderr of {name} is negative; leave it empty where it is not known")
    for objective, members in runs.groupby("objective"):
        loss, _ = losses(members, unit)
        if len(loss) > 2 and np.ptp(loss) == 0:
            raise UserError(f"results: all {len(loss)} losses of {objective} are {loss[0]:g}; collect the runs again")


def in_canonical_order(runs: pd.DataFrame) -> pd.DataFrame:
    """Sorted by what the runs are, so that the order of a table's rows changes no draw."""
    return runs.sort_values(
        ["objective", "tokens", "params_nonembedding", "flops_6nd", "run", "val_nats_per_token"], ignore_index=True
    )


def flops_column(convention: Convention) -> str:
    """The column that counts a run's FLOPs by a convention."""
    return "flops_6nd" if convention == "6nd" else "flops_total"


def counted_conventions(runs: pd.DataFrame, wanted: tuple[Convention, ...] = CONVENTIONS) -> tuple[Convention, ...]:
    """Those of the wanted conventions by which every run has its FLOPs counted."""
    return tuple(name for name in wanted if np.all(_positive(runs[flops_column(name)])))


def _positive(column: pd.Series) -> npt.NDArray[np.bool_]:
    values = column.to_numpy(float, na_value=np.nan)
    return np.isfinite(values) & (values > 0)


def losses(table: pd.DataFrame, unit: Unit) -> tuple[Array, Array]:
    """Loss and its standard error, in ``unit``; the error is NaN where the run reports none."""
    nats = table["val_nats_per_token"].to_numpy(float, na_value=np.nan)
    stderr = table["val_stderr"].to_numpy(float, na_value=np.nan)
    if unit == "nats_per_token":
        return nats, stderr
    bits = table["val_bits_per_byte"].to_numpy(float, na_value=np.nan)
    return bits, stderr * bits / nats


# --- what runs started from -------------------------------------------------------------------------------------------


def with_source_flops(table: pd.DataFrame, counted: bool) -> tuple[pd.DataFrame, list[str]]:
    """A results table for fits, with or without the FLOPs of the weights that its runs started from.

    Such weights have the shape of the run, so that their FLOPs by 6ND are a number of tokens, too.

    Args:
        table: A results table.
        counted: Whether they are added: to the tokens, to the FLOPs by 6ND, and, without attention and output head, to
            the total.

    Returns:
        The table, and a note for each objective, with its variant, of which runs started from weights.
    """
    if "source_flops" not in table.columns:
        return table, []
    source = table["source_flops"].to_numpy(float, na_value=np.nan)
    names = named_variants(table)["objective"].astype(object).map(str).to_numpy()
    unknown = table["variant"].astype(object).fillna("").str.contains(r"(?:^|;)weights=").to_numpy(bool) & np.isnan(
        source
    )
    notes = []
    for name in dict.fromkeys(names):
        own, blank = source[(names == name) & (source > 0)], int(((names == name) & unknown).sum())
        if len(own):
            spent = " to ".join(dict.fromkeys(f"{flops:.3g}" for flops in (own.min(), own.max())))
            told = "are counted, by 6ND" if counted else "are not counted; --source-flops adds them"
            runs = "1 run starts" if len(own) == 1 else f"{len(own)} runs start"
            notes.append(f"{name}: the {spent} FLOPs (6ND) of the weights that {runs} from {told}")
        if blank:
            runs = "1 run starts" if blank == 1 else f"{blank} runs start"
            notes.append(f"{name}: {runs} from weights whose FLOPs are not known and are not counted")
    if not counted:
        return table, notes
    added = np.nan_to_num(source)
    tokens = (added / (6 * table["params_nonembedding"].to_numpy(float, na_value=np.nan))).round()
    sums = {column: table[column] + added for column in ("flops_6nd", "flops_total")}
    return table.assign(**sums, tokens=table["tokens"] + pd.Series(tokens, table.index).astype("Int64")), notes


# --- budgets ---------------------------------------------------------------------------------------------------------


def budget_groups(flops: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """For each run the ordinal of its budget, cheapest first: a gap above ``BUDGET_TOLERANCE`` starts a new one."""
    values = np.log(np.asarray(flops, float))
    order = np.argsort(values, kind="stable")
    groups = np.empty(len(values), np.int64)
    groups[order] = np.cumsum(np.diff(values[order], prepend=values[order][:1]) > np.log(BUDGET_TOLERANCE))
    return groups


def budget_members(flops: npt.ArrayLike) -> list[npt.NDArray[np.intp]]:
    """Row positions of the runs of each budget, cheapest budget first."""
    groups = budget_groups(flops)
    return [np.flatnonzero(groups == group) for group in range(groups.max() + 1)] if len(groups) else []


def is_budget(flops: npt.ArrayLike) -> bool:
    """Whether runs of these FLOPs are of one budget, and no cloud that has no gap in it."""
    values = np.asarray(flops, float)
    return bool(values.max() < BUDGET_TOLERANCE * values.min())


def best_of_budgets(runs: pd.DataFrame, unit: Unit) -> list[int]:
    """Row positions of the best run of each planned budget, cheapest first. ``runs`` are of one objective."""
    loss, _ = losses(runs, unit)
    return [int(members[np.argmin(loss[members])]) for members in budget_members(planned_flops(runs))]


def planned_convention(runs: pd.DataFrame, conventions: tuple[Convention, ...]) -> Convention:
    """The convention by which runs of one objective were planned to be equal: they form the fewest budgets by it."""

    def budgets(convention: Convention) -> int:
        flops = runs[flops_column(convention)].to_numpy(float)
        return sum(1 if is_budget(flops[rows]) else len(rows) for rows in budget_members(flops))

    return min(conventions, key=budgets, default="6nd")


def planned_flops(runs: pd.DataFrame) -> Array:
    """FLOPs of one objective's runs by the convention by which they were planned."""
    return runs[flops_column(planned_convention(runs, counted_conventions(runs)))].to_numpy(float)


# --- how well the losses are known ------------------------------------------------------------------------------------


def noise_of_runs(runs: pd.DataFrame, covariance: pd.DataFrame | None, samples: int, seed: int) -> Noise:
    """The noise of the usable runs of a results table, all objectives at once, in a number of bootstrap draws.

    ``covariance`` is that of the runs' ``val_nats_per_token`` in nats^2, index and columns ``run@steps``. A run that it
    lacks has its own standard error, and no covariance with the others: V is block diagonal, so it stays positive
    semi-definite, and the error of a difference from such a run is not made too small where errors are shared. None,
    or where a run has an error in neither: the table's standard errors, one draw for all runs, or, where one of them is
    missing or zero, the scatter alone.

    Raises:
        UserError: The matrix is no covariance, or lacks all runs.
    """
    loss, stderr = losses(runs, "nats_per_token")
    known = np.isfinite(stderr) & (stderr > 0)
    between = trunks_of(runs), seed_scales(runs)
    if covariance is not None:
        lacking = np.isin(run_names(runs), runs_without(covariance, runs))
        if np.all(known[lacking]):
            joint = np.diag(np.where(lacking, stderr, 0.0) ** 2)
            joint[np.ix_(~lacking, ~lacking)] = _matching(covariance, runs[~lacking])
            return Noise.of(joint / np.outer(loss, loss), "covariance", samples, seed, *between)
    if np.all(known):
        return Noise.of(np.outer(stderr / loss, stderr / loss), "standard errors", samples, seed, *between)
    return Noise.of(np.zeros((len(runs), len(runs))), "scatter", samples, seed, *between)


def trunks_of(runs: pd.DataFrame) -> npt.NDArray[np.intp]:
    """(n,) the number of each run's trunk.

    Milestones of a run are rows of one name. Branches are runs that began from a checkpoint; those of one objective,
    size, seed, rate and batch left the same trunk.
    """
    same = ["objective", "params_nonembedding", "seed"]
    columns = [*same, "lr", "global_batch_tokens", "sequence_length"]
    branch = runs["parent_checkpoint"].notna().to_numpy(bool)
    shared = runs.groupby(columns, dropna=False, sort=False).ngroup().to_numpy()
    alone = runs.groupby([*same, "run"], dropna=False, sort=False).ngroup().to_numpy()
    return np.where(branch, shared, len(runs) + alone)


def run_names(runs: pd.DataFrame) -> list[str]:
    """``run@steps``: what a covariance's rows and columns are called."""
    return [f"{run}@{steps}" for run, steps in zip(runs["run"], runs["steps"], strict=True)]


def runs_without(covariance: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """The names of the runs that a covariance lacks; UserError where it lacks all, so is of another study."""
    missing = [name for name in run_names(runs) if name not in covariance.index or name not in covariance.columns]
    if len(missing) == len(runs):
        raise UserError(
            f"covariance: none of the table's {len(runs)} runs is in it ({missing[0]} …); "
            "collect both files from the same runs, or remove the covariance file"
        )
    return missing


def _matching(covariance: pd.DataFrame, runs: pd.DataFrame) -> Array:
    names = run_names(runs)
    if covariance.index.has_duplicates or covariance.columns.has_duplicates:
        raise UserError("covariance: a run's name is in it twice; write it again")
    matrix = covariance.loc[names, names].to_numpy(float)
    largest = np.max(np.abs(matrix)) if np.all(np.isfinite(matrix)) else np.nan
    if not (largest > 0 and np.allclose(matrix, matrix.T, atol=1e-9 * largest)):
        raise UserError("covariance: not finite, not symmetric, or all zero; write it again")
    if np.linalg.eigvalsh(matrix)[0] < -1e-6 * largest * len(matrix) or np.any(np.diagonal(matrix) <= 0):
        raise UserError("covariance: negative along some direction, so it is none; write it again")
    return (matrix + matrix.T) / 2


# --- the cost of a token ---------------------------------------------------------------------------------------------

SAME_SIZE = 0.01
"""Shapes whose log N differs by less are one knot: the slope between them would be noise."""

SANE_SLOPES = (0.5, 1.5)
"""The range of slopes of log FLOPs per token against log N: 1 by 6ND, less where the head is a large part."""


@dataclass(frozen=True)
class TokenCost:
    """Training FLOPs of a token as a function of non-embedding parameters, in logarithms.

    By 6ND it is log 6 + log N. By the total it depends on the shapes as well: a line through the study's own shapes,
    straight between two of them (knots: log N rising, log FLOPs a token), and beyond the ends with the slope of a
    line through all of them: two neighbours that differ in depth would tell any slope.
    """

    log_n: Array
    log_cost: Array
    slope: float = 1.0

    @classmethod
    def of_runs(cls, runs: pd.DataFrame, convention: Convention) -> TokenCost:
        log_n = np.log(runs["params_nonembedding"].to_numpy(float))
        if convention == "6nd":
            ends = np.array([log_n.min(), log_n.min() + 1.0])
            return cls(ends, np.log(6.0) + ends)
        log_cost = np.log(runs[flops_column(convention)].to_numpy(float) / runs["tokens"].to_numpy(float))
        order = np.argsort(log_n, kind="stable")
        near = np.cumsum(np.diff(log_n[order], prepend=log_n[order[0]]) > SAME_SIZE)
        knots, costs = (np.bincount(near, values[order]) / np.bincount(near) for values in (log_n, log_cost))
        # One shape tells of others only that FLOPs grow with N.
        slope = np.polyfit(knots, costs, 1)[0] if len(knots) > 1 else 1.0
        return cls(knots, costs, float(np.clip(slope, *SANE_SLOPES)))

    def __call__(self, log_n: npt.ArrayLike) -> Array:
        """log FLOPs a token at log N, any shape."""
        log_n = np.asarray(log_n, float)
        inside = np.clip(log_n, self.log_n[0], self.log_n[-1])
        return np.asarray(np.interp(inside, self.log_n, self.log_cost) + self.slope * (log_n - inside), np.float64)
