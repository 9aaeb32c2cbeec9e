"""The options that `llada generate` and `llada chat` share: of the model, and of the sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llada_lightning.support.command_line import CommandParser, unescaped

if TYPE_CHECKING:
    from llada_lightning.checkpoints import LanguageModel
    from llada_lightning.generation.result import Generation

# The names that `generate` knows, said here as well because it imports torch and --help should not wait for that.
STRATEGIES = ("diffusion", "block_diffusion", "autoregressive")
REMASKINGS = ("low_confidence", "margin", "entropy", "random", "random_count")
CACHES = ("none", "kv", "prefix", "dual")
DTYPES = ("float32", "bfloat16", "float16")

SAMPLING = (
    "length", "steps", "block_length", "strategy", "remasking", "temperature", "top_k", "top_p", "cfg_scale",
    "threshold", "zero_eos_confidence", "stop", "cache", "seed", "compat",
)  # fmt: skip
"""Settings of ``generate`` that are options of both commands."""


def add_model_options(parser: CommandParser) -> None:
    """Which model, and where it runs."""
    parser.add_argument(
        "checkpoint",
        type=str,
        metavar="CKPT",
        help="run folder, .ckpt, folder of `llada convert`, or Hugging Face folder of LLaDA or Llama",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--tokenizer", type=str, default=None, help="instead of the checkpoint's: tokenizer.json, folder"
    )
    model.add_argument(
        "--device", type=str, default=None, help="cpu, cuda, cuda:1 …; by default a GPU where there is one"
    )
    model.add_argument("--dtype", choices=DTYPES, default=None, help="of the weights; by default as they are stored")


def add_sampling_options(parser: CommandParser) -> None:
    """How an answer is sampled; defaults are those of ``generate``."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add(
        "--length",
        type=int | None,
        default=None,
        help="tokens of the answer; by default 128, or what fits",
    )
    add("--steps", type=int | None, default=None, help="of the whole answer; by default one for each token")
    add("--block-length", type=int | None, default=None, help="tokens denoised together; by default all of them")
    add(
        "--strategy",
        choices=STRATEGIES,
        default=None,
        help="diffusion: fixed length (with --block-length in blocks from left to right); block_diffusion: grows block "
        "by block until EOS; autoregressive: token by token. By default diffusion for llada, autoregressive for arm",
    )
    add("--remasking", choices=REMASKINGS, default="low_confidence", help="which predictions stay at the end of a step")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--top-k", type=int | None, default=None, help="draw from the k likeliest tokens")
    add("--top-p", type=float | None, default=None, help="draw from the likeliest tokens that hold this share")
    add(
        "--cfg-scale",
        type=float,
        default=0.0,
        help="weight of classifier-free guidance; 0 is none, above it a pass costs two",
    )
    add(
        "--threshold",
        type=float | None,
        default=None,
        help="keep every prediction of more confidence than this, at least one a step, instead of --steps",
    )
    add("--zero-eos-confidence", action="store_true", help="predictions of EOS are kept last")
    add(
        "--stop",
        type=str,
        action="append",
        default=None,
        metavar="TEXT",
        help=r"ends the answer; may be given again; '\n' is a new line",
    )
    add("--cache", choices=CACHES, default=None, help="kv: of arm, exact; prefix, dual: of llada's blocks, approximate")
    add("--seed", type=int, default=0, help="of the noise, with the prompt's place in the list")
    add(
        "--compat",
        choices=("llada",),
        default=None,
        help="sample as the authors' released code does: an answer then depends on its batch",
    )


def sampling_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``generate`` that the options say."""
    settings = {name: options[name] for name in SAMPLING}
    settings["stop"] = [unescaped(text) for text in settings["stop"] or ()]
    return settings


def load(options: dict[str, Any]) -> LanguageModel:
    """The model that the options name.

    Raises:
        UserError: it cannot be read, or there is no such device, see ``load_model``.
    """
    from llada_lightning.checkpoints.language_model import load_model

    return load_model(
        options["checkpoint"], tokenizer=options["tokenizer"], device=options["device"], dtype=options["dtype"]
    )


def sample(lm: LanguageModel, prompts: Any, settings: dict[str, Any], **more: Any) -> Generation:
    """``generate``, with the seed for the released sampler too, which draws from torch's generator."""
    import torch

    from llada_lightning.generation.sampling import generate

    if settings["compat"] is not None:
        torch.manual_seed(settings["seed"])
    return generate(lm, prompts, **settings, **more)


def strategy_of(lm: LanguageModel, settings: dict[str, Any]) -> str:
    """The strategy that is meant where none is said."""
    return settings["strategy"] or ("autoregressive" if lm.causal else "diffusion")


def facts(lm: LanguageModel, settings: dict[str, Any], generation: Generation) -> str:
    """One line: how the answers came to be, how fast, and what ended them."""
    strategy, speed = strategy_of(lm, settings), generation.tokens_per_second
    said, guided = [strategy], settings["cfg_scale"] > 0
    if strategy != "autoregressive":
        if settings["block_length"]:
            said.append(f"blocks of {settings['block_length']}")
        said.append(settings["remasking"])
        limit = settings["threshold"]
        said.append(f"threshold {limit:g}" if limit is not None else f"{generation.steps} steps")
    said += [
        f"{generation.forward_passes} forward passes{' (each with and without the prompt)' if guided else ''}",
        f"{speed:,.0f} tokens/s" if speed >= 100 else f"{speed:.3g} tokens/s",
        f"cache {generation.cache}{' (approximate)' if generation.cache in ('prefix', 'dual') else ''}",
    ]
    if settings["compat"] is not None:
        said.append(f"compat {settings['compat']}")
    if not settings.get("infill"):  # a gap ends where it ends
        said.append(f"finish {_counted(generation.finish)}")
    return ", ".join(said)


def _counted(finish: Any) -> str:
    """`eos` where all answers ended so, else `3 eos 1 length`."""
    kinds = dict.fromkeys(finish)
    return " ".join(kinds if len(kinds) == 1 else (f"{list(finish).count(kind)} {kind}" for kind in kinds))
