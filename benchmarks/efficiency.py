r"""Sampling efficiency of `llada` and `arm` (paper, Appendix B.7): Figure 5 and Table 11 for checkpoints of yours.

Quality and throughput against the number of steps: pure diffusion, blocks without and with caches, confidence
thresholds; `arm` without and with its cache. Peak memory against input and output length. Writes ``efficiency.json``
and ``efficiency.png`` and prints a report.

On a CPU, with a corpus that `llada prepare` wrote:

    OMP_NUM_THREADS=2 python benchmarks/efficiency.py --llada runs/demo/llada --arm runs/demo/arm \
        --data data/quickstart --out runs/demo/efficiency --temperature 1 --remasking random_count

Small models repeat themselves at temperature 0, the default and the paper's way; at 1 their samples show what fewer
steps cost.

On a GPU, as the paper has it (bf16, nothing compiled, one prompt at a time), with checkpoints of different tokenizers:

    python benchmarks/efficiency.py --llada GSAI-ML/LLaDA-8B-Base --arm meta-llama/Meta-Llama-3-8B \
        --prompts prompts.txt --out efficiency --device cuda --dtype bfloat16 --batch 1 --prompts-count 16

where the checkpoints are folders on this machine.
"""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench_report import hardware
from efficiency_figure import above_weights, efficiency_figure
from efficiency_memory import measure_memory
from efficiency_quality import Prompts, judged, prompts_of_data, prompts_of_file
from efficiency_samplers import Sampler, Timing, agreement, study_samplers, time_samplers
from llada_lightning.checkpoints.language_model import LanguageModel, load_model
from llada_lightning.checkpoints.stored_model import open_checkpoint
from llada_lightning.checkpoints.stored_tensors import common_dtype, dtype_named, name_of
from llada_lightning.study.plots.style import write_figure
from llada_lightning.support.command_line import CommandParser, add_json, print_json
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import write_json
from llada_lightning.support.source import git_commit
from llada_lightning.training.record import versions


def efficiency_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(prog="efficiency.py", description="Sampling efficiency of a llada and an arm checkpoint.")
    parser.add_argument("--llada", type=str, required=True, help="a checkpoint of any kind")
    parser.add_argument("--arm", type=str, required=True, help="a checkpoint of any kind")
    parser.add_argument("--judge", type=str, default=None, help="the arm that judges the answers; by default --arm")
    parser.add_argument("--data", type=str, default=None, help="prompts: a prepared folder's validation split")
    parser.add_argument("--prompts", type=str, default=None, help="prompts: a text file, one a line")
    parser.add_argument("--out", type=str, required=True, help="folder to write to")
    parser.add_argument("--length", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--steps", type=int, nargs="+", default=[32, 64, 128, 256], help="of llada's samplers")
    parser.add_argument("--block-length", type=int, default=32, help="of the samplers in blocks")
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence, of the samplers without a schedule")
    parser.add_argument("--remasking", type=str, default="low_confidence", help="of llada's samplers with a schedule")
    parser.add_argument("--temperature", type=float, default=0.0, help="of all samplers; 0: the likeliest token")
    parser.add_argument("--prompts-count", type=int, default=32, help="prompts, a multiple of the batch")
    parser.add_argument("--prompt-length", type=int, default=64, help="tokens of a prompt from --data")
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time; each batch is timed")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts and of the noise")
    parser.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=str, default=None, help="of the weights; by default as stored")
    parser.add_argument("--memory-inputs", type=int, nargs="*", default=[512, 1024], help="tokens; none: no memory")
    parser.add_argument("--memory-outputs", type=int, nargs="*", default=[512, 1024, 2048], help="tokens")
    add_json(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake."""
    try:
        options = efficiency_parser().parse_args(sys.argv[1:] if argv is None else argv)
        result = study(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = Path(options.out)
    write_json(out / "efficiency.json", result)
    write_figure(efficiency_figure(result), out, "efficiency")
    if options.json:
        print_json(result)
    else:
        print(report(result))
    return 0


def study(options: Any) -> dict[str, Any]:
    """Everything that is measured, as ``efficiency.json`` holds it.

    Raises:
        UserError: an option, a checkpoint or the prompts cannot be.
    """
    check(options)
    samplers = study_samplers(options.length, options.steps, options.block_length, options.threshold, options.remasking)
    memory = [row for path in (options.llada, options.arm) for row in memory_of(path, options)]
    say("models")
    models: dict[str, LanguageModel] = {
        "llada": loaded(options.llada, "llada", options),
        "arm": loaded(options.arm, "arm", options),
    }
    judge = models["arm"] if options.judge in (None, options.arm) else loaded(options.judge, "arm", options)
    prompts = read_prompts(options, [*models.values(), judge])
    batches = [prompts.prompts[i : i + options.batch] for i in range(0, options.prompts_count, options.batch)]
    say(f"{len(samplers)} samplers, {len(batches)} batches of {options.batch}")
    timings = time_samplers(
        models, samplers, batches, length=options.length, temperature=options.temperature, seed=options.seed
    )
    say("quality")
    continuations = None
    if prompts.continuations is not None:
        continuations = judged(judge, models["arm"], prompts.prompts, prompts.continuations).record()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(torch.device(options.device)),
        "versions": versions(),
        "git_commit": git_commit(),
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "json")},
        "models": {name: described(lm) for name, lm in (*models.items(), ("judge", judge))},
        "prompts": prompts.source,
        "continuations": continuations,
        "samplers": [
            sampler_record(sampler, samplers, timings, models[sampler.objective], judge, prompts.prompts)
            for sampler in samplers
        ],
        "memory": memory,
    }


def check(options: Any) -> None:
    """Raises UserError for options that do not go together, before anything is read."""
    if (options.data is None) == (options.prompts is None):
        raise UserError("prompts: give either --data (a prepared folder) or --prompts (a text file)")
    batch, count = options.batch, options.prompts_count
    if batch < 1 or count < 1 or count % batch:
        nearest = max(1, round(count / max(1, batch))) * max(1, batch)
        raise UserError(f"--prompts-count: {count} is no multiple of batch {batch}; give {nearest}")
    if min([options.prompt_length, options.length, *options.memory_inputs, *options.memory_outputs]) < 1:
        raise UserError("lengths: one is below 1 token; give --length, --prompt-length, --memory-… of at least 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device: '{options.device}' given, but torch finds no GPU; give --device cpu")


def loaded(path: str, objective: str, options: Any) -> LanguageModel:
    """A checkpoint, which must be of an objective."""
    lm = load_model(path, device=options.device, dtype=options.dtype)
    if lm.objective != objective:
        raise UserError(f"'{path}' is a checkpoint of {lm.objective}; give one of {objective} here")
    return lm


def memory_of(path: str, options: Any) -> list[dict[str, Any]]:
    """Peak memory of a checkpoint's shape; measured before a model takes the device's memory."""
    if not options.memory_inputs or not options.memory_outputs:
        return []
    stored = open_checkpoint(path)
    say(f"memory, {stored.description.objective}")
    dtype = dtype_named(options.dtype) or common_dtype(stored.weights.values())
    lengths = options.memory_inputs, options.memory_outputs
    return measure_memory(stored.description, name_of(dtype), options.device, *lengths)


def read_prompts(options: Any, models: list[LanguageModel]) -> Prompts:
    if options.prompts is not None:
        return prompts_of_file(Path(options.prompts), options.prompts_count)
    return prompts_of_data(
        options.data, options.prompts_count, options.prompt_length, options.length, models, options.seed
    )


def sampler_record(
    sampler: Sampler,
    samplers: list[Sampler],
    timings: dict[str, Timing],
    lm: LanguageModel,
    judge: LanguageModel,
    prompts: list[Any],
) -> dict[str, Any]:
    """A row of the results."""
    timing = timings[sampler.name]
    rates = timing.tokens_per_second
    exact = next((s for s in samplers if s.family == sampler.exact and s.steps == sampler.steps), None)
    return {
        "sampler": sampler.name,
        "objective": sampler.objective,
        "family": sampler.family,
        "steps": sampler.steps,
        "tokens_per_second": median(rates),
        "slowest_batch": min(rates),
        "fastest_batch": max(rates),
        "forward_passes": timing.forward_passes,
        **judged(judge, lm, prompts, timing.answers).record(),
        "same_tokens_as": None if exact is None else exact.name,
        "same_tokens": None if exact is None else agreement(timing.answers, timings[exact.name].answers),
    }


def described(lm: LanguageModel) -> dict[str, Any]:
    return {
        "checkpoint": lm.name,
        "objective": lm.objective,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "dtype": name_of(lm.model.head.weight.dtype),
        "context_length": lm.context_length,
    }


def say(what: str) -> None:
    print(f"efficiency: {what}", file=sys.stderr, flush=True)


# --- report ----------------------------------------------------------------------------------------------------------

LEGEND = """\
Tokens/s count every token of an answer, of one length for all samplers: no end of text stops any of them. Median over \
the batches, of batch {batch}, after a warm-up; the batches of all samplers go in turns. Nats/token: of the answers up \
to their first end of text, given their prompts, under the judge {judge}{own}; lower is likelier, and repetition is \
likeliest of all, so read them beside the entropy (nats) of the words of an answer, where repetition shows as little. \
Samplers with a threshold keep the surest tokens, whatever the remasking, and take as many passes as these need. ± is \
one standard error over {prompts} prompts. Same tokens: as the same sampler without a cache, place by place; caches of \
llada are approximate, that of arm is exact but for rounding."""

MEMORY_LEGEND = """\
Peak {what} of writing one answer, with random weights of the same shape, in {unit}; "weights" is what was there \
before. Every step of llada takes the same memory, so {llada_steps} steps were taken. The arm without a cache wrote \
its last tokens only, behind all the others: its peak is its last pass."""


def report(result: dict[str, Any]) -> str:
    """The results in Markdown."""
    setting, models = result["settings"], result["models"]
    lines = [
        f"# Sampling efficiency, {result['date'][:10]}",
        "",
        f"{result['hardware']['device']} ({result['hardware']['cores']} cores); "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "",
        *(f"- {name}: `{m['checkpoint']}`, {m['parameters']:,} parameters, {m['dtype']}" for name, m in models.items()),
        f"- prompts: {setting['prompts_count']}, {result['prompts']}; answers: {setting['length']} tokens, temperature "
        f"{setting['temperature']:g}, {setting['remasking']}",
        "",
        *quality_table(result),
        "",
        LEGEND.format(
            batch=setting["batch"],
            judge=f"`{models['judge']['checkpoint']}`",
            own=" (the arm under study: it favours its own answers)" if models["judge"] == models["arm"] else "",
            prompts=setting["prompts_count"],
        ),
    ]
    return "\n".join([*lines, *memory_table(result)])


def quality_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| sampler | tokens/s | slowest to fastest batch | passes | nats/token | entropy | mean length | same tokens |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["samplers"]:
        same = "" if row["same_tokens"] is None else f"{row['same_tokens']:.1%}"
        lines.append(
            f"| {row['sampler']} | {row['tokens_per_second']:,.1f} | {row['slowest_batch']:,.1f} to "
            f"{row['fastest_batch']:,.1f} | {row['forward_passes']:,.0f} | {quality_cells(row)} | {same} |"
        )
    if result["continuations"] is not None:
        lines.append(f"| the true continuations | | | | {quality_cells(result['continuations'])} | |")
    return lines


def quality_cells(row: dict[str, Any]) -> str:
    nats = f"{row['nats_per_token']:.3f} ± {row['nats_stderr']:.3f}"
    return f"{nats} | {row['entropy']:.2f} ± {row['entropy_stderr']:.2f} | {row['mean_length']:.0f}"


def memory_table(result: dict[str, Any]) -> list[str]:
    """One row for each input and output length, as Table 11 has it."""
    rows = result["memory"]
    if not rows:
        return []
    unit, size = ("GB", 1e9) if max(row["peak_bytes"] for row in rows) >= 1e10 else ("MB", 1e6)
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    peaks = {(row["input"], row["output"], row["sampler"]): row for row in rows}
    lines = [
        "",
        "| input | output | " + " | ".join(f"{name}: peak | above weights" for name in names) + " |",
        "|---:|---:|" + "---:|---:|" * len(names),
    ]
    for given, written in dict.fromkeys((row["input"], row["output"]) for row in rows):
        found = [peaks[given, written, name] for name in names]
        cells = [f"{row['peak_bytes'] / size:,.2f} | {above_weights(row) / size:,.2f}" for row in found]
        lines.append(f"| {given} | {written} | " + " | ".join(cells) + " |")
    what = "memory allocated by torch on the GPU" if rows[0]["measure"] == "cuda" else "resident memory of the process"
    return [*lines, "", MEMORY_LEGEND.format(what=what, unit=unit, llada_steps=rows[0]["llada_steps"])]


if __name__ == "__main__":
    sys.exit(main())
