"""The commands of `llada`: one file for each verb, and the table of verbs that `llada --help` prints.

Each of these files has `main(argv) -> int`: it takes the arguments after the verb and returns the exit code.
"""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """A command of `llada`: its name, its line in `--help` and the heading there, its file, and its first arguments."""

    name: str
    help: str
    group: str
    file: str
    first: tuple[str, ...] = ()


VERBS = (
    Verb("prepare", "corpus -> tokenizer -> shards that training streams", "data", "prepare"),
    Verb("fit", "train one model; --budget.flops decides for how long; resumes by itself", "training", "fit", ("fit",)),
    Verb("validate", "the loss of a checkpoint: exact for arm, the bound for llada", "training", "fit", ("validate",)),
    Verb("test", "the same under Lightning's other name", "training", "fit", ("test",)),
    Verb("predict", "the nats of each validation sequence, one a line", "training", "fit", ("predict",)),
    Verb("launch", "resolve a fit once and start it on many processes (srun, torchrun)", "training", "launch"),
    Verb("replay", "one step of a run: its sequences, each with its part of the loss", "training", "replay"),
    Verb("plan", "FLOP budgets -> a table of runs and its sweep; --tune, --append, --paper", "scaling study", "plan"),
    Verb("sweep", "run a sweep file on this machine, skipping what is done", "scaling study", "sweep"),
    Verb("collect", "run folders, W&B projects -> one table of results", "scaling study", "collect"),
    Verb("curves", "results -> fits, figures; of a tuning study --rules, a run --by-level", "scaling study", "curves"),
    Verb("forecast", "results -> the loss at budgets not yet run, in a dated file", "scaling study", "forecast"),
    Verb(
        "report",
        "a study -> one page: verdict, figures, tables, limits; HTML, Markdown",
        "scaling study",
        "report",
    ),
    Verb("compare", "two results -> the difference of their losses, with its error", "scaling study", "compare"),
    Verb("generate", "text from a checkpoint, by any sampler; the process drawn", "checkpoint", "generate"),
    Verb("chat", "a conversation with a checkpoint", "checkpoint", "chat"),
    Verb("score", "log-likelihood of continuations, multiple choice, perplexity of texts", "checkpoint", "score"),
    Verb(
        "evaluate",
        "benchmarks through lm-evaluation-harness; iGSM, reversal, the paper's Tables 6 to 10",
        "checkpoint",
        "evaluate",
    ),
    Verb("convert", "checkpoint -> inference folder of ours, Hugging Face LLaDA or Llama", "checkpoint", "convert"),
)
"""The verbs in the order of `llada --help`; those of a group are neighbours."""

FORMER_VERBS = {
    "igsm": "llada evaluate CKPT --tasks igsm",
    "reversal": "llada evaluate CKPT --tasks reversal --metadata pairs=FILE.json",
    "ablate": "llada evaluate CKPT --suite ablate-length --tasks TASK",
}
"""Verbs of earlier versions, each with the command that does the same now."""


def usage() -> str:
    """The text of `llada --help`."""
    lines = [
        "usage: llada COMMAND [options]        (llada COMMAND --help lists a command's options)",
        "",
        "How does masked diffusion (LLaDA) scale against autoregression, under the same compute?",
    ]
    group = None
    for verb in VERBS:
        if verb.group != group:
            lines += ["", f"{verb.group}:"]
        group = verb.group
        lines.append(f"  {verb.name:<9}  {verb.help}")
    return "\n".join([*lines, "", "  --version  print the version", ""])
