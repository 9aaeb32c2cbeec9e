"""The settings of the sampler, and what a sampler returns. Importable without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from llada_lightning.generation.reveal import RULES
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import warn_once

if TYPE_CHECKING:
    from llada_lightning.checkpoints.language_model import LanguageModel

Strategy = Literal["diffusion", "block_diffusion", "autoregressive", "ancestral"]
Cache = Literal["none", "kv", "prefix", "dual"]
Finish = Literal["eos", "stop", "length"]

_OF_FIXED_LENGTH = ("diffusion", "ancestral")
"""The strategies whose answers have their length from the beginning."""

DEFAULT_LENGTH = 128
"""The number of tokens of an answer where the context has room for it."""

OF_EVERY_STRATEGY = frozenset({"length", "temperature", "top_k", "top_p", "stop", "cache", "seed"})
"""The settings that mean something from left to right, too. The others are those of masked diffusion."""


def only_left_to_right(lm: LanguageModel) -> bool:
    """Whether a model can only write one token after the other: its objective has nothing to denoise."""
    return not lm.facts.denoises


@dataclass(frozen=True)
class Sampling:
    r"""The settings by which answers are sampled.

    What is left out follows from the model and its prompts (:meth:`resolved`). `llada generate`, `llada chat` and
    `llada evaluate` have an option for each setting but `infill`, with the text below.

    Args:
        length: The largest number of tokens of an answer; with `diffusion` the exact number, EOS and what follows it
            included. By default 128, or what the context leaves of that. With `infill` the gaps say it.
        steps: The number of steps of the whole answer, spread evenly over its blocks; by default one for each token.
            More than that reveal nothing but with `random`, where a finer process reveals fewer tokens at once.
        block_length: The number of tokens that are denoised together, a divisor of the length; by default all of them.
            Blocks follow one another from left to right.
        strategy: `diffusion`: of a fixed length, in one block, or in several from left to right; `block_diffusion`:
            grows block by block until EOS; `autoregressive`: grows token by token (paper, Fig. 4). By default
            `diffusion` for a masked diffusion model such as `llada`, `autoregressive` for `arm`, and `block_diffusion`
            for `block`, which has no other, in blocks of its own length. `uniform` has `ancestral` alone: from random
            tokens, each of which may change at every step, of a fixed length.
        remasking: The reveal rule: which predictions stay at the end of a step. Those of the highest probability
            (`low_confidence`, Algorithm 5), of the widest margin to the second candidate (`margin`), or of the lowest
            entropy (`entropy`); or by chance, each with the probability of the reverse process (`random`, Algorithm 4),
            or the scheduled number of them (`random_count`).
        temperature: The temperature of the Gumbel noise, at most 1e4; 0 takes the likeliest token.
        top_k: The number of the likeliest tokens to draw from.
        top_p: The share of the probability that the likeliest tokens to draw from hold.
        cfg_scale: The weight w of unsupervised classifier-free guidance (Eq. 16); 0 is none, above it a pass costs two.
        threshold: The confidence above which every prediction is kept, at least one a step, instead of a number of
            steps.
        zero_eos_confidence: Whether predictions of EOS are kept last (paper, B.4).
        stop: A text that ends an answer; there can be several. On the command line, '\n' is a new line.
        infill: Whether the prompts hold [MASK]s, and these are what is filled.
        cache: The cache of keys and values. `kv`: of `arm` and `block`, exact. `prefix`, `dual`: what is before a block
            of `llada`, or before and behind it, is computed once a block, which is approximate.
        seed: The seed of the noise, which depends on the number of the prompt as well.
        compat: `llada` samples as the authors' released code does; an answer then depends on its batch.
        kappa: The share of the posterior in a step of `ancestral`. The rest forgets the token, which corrects it; 1 is
            ancestral sampling, 0.95 a predictor-corrector.

    Raises:
        UserError: A value is not known or out of its range, or two settings do not go together.
    """

    length: int | None = None
    steps: int | None = None
    block_length: int | None = None
    strategy: Strategy | None = None
    remasking: str = "low_confidence"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    cfg_scale: float = 0.0
    threshold: float | None = None
    zero_eos_confidence: bool = False
    stop: Sequence[str] = ()
    infill: bool = False
    cache: Cache | None = None
    seed: int = 0
    compat: Literal["llada"] | None = None
    kappa: float = 1.0

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        for name, choices in choices_of_settings().items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UserError(f"{name}: '{value}' is not known; choose from {', '.join(choices)}")
        for name in ("length", "steps", "block_length", "top_k"):
            _check_whole(name, getattr(self, name))
        if not 0 <= self.temperature <= 1e4:
            raise UserError(f"temperature: {self.temperature} given; it must lie between 0 (greedy) and 1e4")
        for name in ("top_p", "threshold"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{name}: {share} given; it must lie in (0, 1]")
        if not 0 <= self.kappa <= 1:
            raise UserError(f"kappa: {self.kappa} given; it must lie in [0, 1], such as 0.95")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise UserError(f"cfg_scale: {self.cfg_scale} given; it must be 0 (no guidance) or above")
        if any(not isinstance(text, str) or not text for text in stop):
            raise UserError("stop: an empty string is in every text; give strings of at least one character")
        self._check_together()

    def _check_together(self) -> None:
        """Refuses settings that do not go together, whatever the model."""
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            name = "top_p" if self.top_k is None else "top_k"
            raise UserError(
                f"{name}: {getattr(self, name)} does nothing at temperature 0, which takes the likeliest token; give a "
                "temperature above 0, or leave it out"
            )
        if self.steps is not None and self.threshold is not None:
            raise UserError(
                f"steps: {self.steps} given with threshold {self.threshold}, which decides their number; leave one out"
            )
        rule = RULES[self.remasking]
        if rule.confidence is None and (self.zero_eos_confidence or self.threshold is not None):
            name = "zero_eos_confidence" if self.zero_eos_confidence else "threshold"
            raise UserError(f"{name}: remasking '{self.remasking}' knows no confidence; take low_confidence")
        if self.threshold is not None and not rule.threshold:
            raise UserError(
                f"threshold: the confidence of remasking '{self.remasking}' is no share of 1; take low_confidence"
            )

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that are not the defaults, by their names."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

    @property
    def grows(self) -> bool:
        """Whether the answer grows, so that what follows is not there yet."""
        return self.strategy not in _OF_FIXED_LENGTH

    @property
    def steps_per_block(self) -> int | None:
        """The number of steps of a block, of resolved settings; None where a threshold or the gaps decide."""
        assert self.length is not None and self.block_length is not None
        return None if self.steps is None else self.steps // (self.length // self.block_length)

    def steps_of_blocks(self, columns: Sequence[int]) -> list[int] | None:
        """The number of steps of each block of so many columns, of resolved settings; None where there is no schedule.

        Where the prompt has begun the first block, the last one lacks as many columns: the two share the steps of one
        block by their columns, each with at least one step.
        """
        steps, size = self.steps_per_block, self.block_length
        if steps is None or size is None or self.infill or columns[0] == size:
            return None if steps is None else [steps] * len(columns)
        first = min(max(1, round(steps * columns[0] / size)), max(1, steps - 1))
        return [first, *[steps] * (len(columns) - 2), max(1, steps - first)]

    @property
    def most_steps(self) -> int:
        """The largest possible number of steps, of resolved settings."""
        assert self.length is not None
        return self.length if self.steps is None else self.steps

    def strategy_for(self, lm: LanguageModel) -> Strategy:
        """The strategy that is given, or else the default of a model."""
        if lm.block_length is not None:
            return self.strategy or "block_diffusion"
        if lm.facts.replaces:
            return self.strategy or "ancestral"
        return self.strategy or ("autoregressive" if only_left_to_right(lm) else "diffusion")

    def resolved(self, lm: LanguageModel) -> Sampling:
        """The settings as they run, checked: what was given, and what follows from it and the model.

        A note on stderr, once a process, says where more steps are given than there are tokens to reveal.
        ``steps`` stays None where a threshold decides, or where each text with gaps has as many steps as gaps.
        """
        assert self.length is not None
        strategy = self.strategy_for(lm)
        block_length, steps = self.block_length, self.steps
        if strategy == "autoregressive":
            takes = "autoregressive sampling takes"
            if block_length not in (None, 1, self.length):
                raise UserError(f"block_length: {block_length} given; {takes} one token at a time; leave it out")
            if steps not in (None, self.length):
                raise UserError(f"steps: {steps} given; {takes} {self.length}, one for each token; leave it out")
            block_length = 1
        elif lm.block_length is not None:
            if block_length not in (None, lm.block_length):
                raise UserError(
                    f"block_length: {block_length} given, but '{lm.name}' predicts blocks of {lm.block_length}; leave "
                    "it out"
                )
            block_length = lm.block_length
        elif strategy == "ancestral" and block_length not in (None, self.length):
            raise UserError(f"block_length: {block_length} given; ancestral sampling has no blocks; leave it out")
        elif self.infill and block_length is not None:
            raise UserError(f"block_length: {block_length} given; infilling takes all gaps of a text together")
        block_length = block_length or self.length
        if self.length % block_length:
            raise UserError(
                f"block_length: {block_length} does not divide length {self.length}; the nearest lengths are "
                f"{_nearest(self.length, block_length)}"
            )
        blocks = self.length // block_length
        if steps is not None and steps % blocks:
            raise UserError(
                f"steps: {steps} do not divide evenly into {blocks} blocks; the nearest are {_nearest(steps, blocks)}"
            )
        if steps is None and not self.infill and self.threshold is None:
            steps = self.length
        by_count = self.compat is not None or RULES[self.remasking].by_schedule
        if steps is not None and steps > self.length and by_count and strategy != "ancestral":
            warn_once(
                f"note: steps: {steps} given for {self.length} tokens, and a step reveals at least one; "
                f"{steps - self.length} steps reveal nothing, so give at most {self.length}"
            )
        if self.stop and lm.tokenizer is None:
            raise UserError(f"stop: {self.stop[0]!r} given, but '{lm.name}' has no tokenizer that could spell it")
        for text in self.stop:
            if any(token in text for token in spelled_specials(lm)):
                raise UserError(
                    f"stop: {text!r} holds a special token, which is never part of an answer's text; leave it out (the "
                    "end of a text ends an answer by itself)"
                )
        exact = only_left_to_right(lm) or lm.block_length is not None
        cache = self.cache or ("kv" if exact else "none")
        settings = replace(self, strategy=strategy, block_length=block_length, steps=steps, cache=cache)
        settings._check_model(lm)
        if strategy == "block_diffusion" and (self.block_length or lm.block_length) is None:
            raise UserError(
                "block_length: not given; block_diffusion grows by so many tokens at a time; give 32, as the paper"
            )
        return settings

    def _check_model(self, lm: LanguageModel) -> None:
        """Refuses what the samplers of a model do not have."""
        if lm.facts.replaces:
            self._refuse(
                f"'{lm.name}' is of {lm.objective}, which denoises random tokens, all of an answer together",
                strategy=self.strategy != "ancestral",
                infill=self.infill,
                cfg_scale=self.cfg_scale > 0,
                threshold=self.threshold is not None,
                remasking=self.remasking != "low_confidence",
                zero_eos_confidence=self.zero_eos_confidence,
                cache=self.cache != "none",
                compat=self.compat is not None,
            )
            return
        self._refuse(
            f"'{lm.name}' is of {lm.objective}, which has no random tokens to denoise",
            strategy=self.strategy == "ancestral",
            kappa=self.kappa != 1,
        )
        if only_left_to_right(lm):
            self._refuse(
                f"'{lm.name}' is an {lm.objective}, which writes one token after the other",
                strategy=self.strategy != "autoregressive",
                infill=self.infill,
                cfg_scale=self.cfg_scale > 0,
                threshold=self.threshold is not None,
                remasking=self.remasking != "low_confidence",
                zero_eos_confidence=self.zero_eos_confidence,
                cache=self.cache not in ("none", "kv"),
                compat=self.compat is not None,
            )
            return
        if lm.block_length is not None:
            self._refuse(
                f"'{lm.name}' is of {lm.objective}, which predicts one block after the other",
                strategy=self.strategy not in (None, "block_diffusion"),
                infill=self.infill,
                cache=self.cache not in (None, "none", "kv"),
                compat=self.compat is not None,
            )
            return
        if lm.shift_targets:
            self._refuse(
                f"'{lm.name}' predicts a token from the one before it, which the released sampler does not",
                compat=self.compat is not None,
            )
        if self.cache == "kv":
            raise UserError(
                f"cache: 'kv' is exact under causal attention only; {lm.objective} has prefix and dual (approximate)"
            )
        if self.infill:
            self._refuse(
                "infilling denoises all of a given text, without caches",
                strategy=self.grows,
                cache=self.cache != "none",
                stop=bool(self.stop),
            )
        if self.compat is not None:
            self._refuse(
                "the released sampler, which compat 'llada' repeats, has no such thing",
                strategy=self.grows,
                remasking=not RULES[self.remasking].released,
                top_k=self.top_k is not None,
                top_p=self.top_p is not None,
                threshold=self.threshold is not None,
                cache=self.cache != "none",
                stop=bool(self.stop),
                infill=self.infill,
            )

    def _refuse(self, why: str, **wrong: bool) -> None:
        """Raises UserError for the first setting that is wrong."""
        for name in (name for name, refused in wrong.items() if refused):
            value = getattr(self, name)
            shown = name if value is True else f"{name} '{value}'" if isinstance(value, str) else f"{name} {value}"
            raise UserError(f"{shown}: {why}; leave it out")


def spelled_specials(lm: LanguageModel) -> list[str]:
    """The special tokens as the tokenizer spells them, which are never part of an answer's text."""
    assert lm.tokenizer is not None
    return [token.content for token in lm.tokenizer.get_added_tokens_decoder().values() if token.special]


def choices_of_settings() -> dict[str, tuple[str, ...]]:
    """The values that the settings with a fixed set of values can have; registered reveal rules are among them."""
    return {
        "strategy": get_args(Strategy),
        "remasking": tuple(RULES),
        "cache": get_args(Cache),
        "compat": ("llada",),
    }


def default_length(room: int, block_length: int | None) -> int:
    """The length of an answer where none is given: what there is room for of 128 tokens, in whole blocks."""
    _check_whole("block_length", block_length)
    block = block_length or 1
    return DEFAULT_LENGTH if room >= DEFAULT_LENGTH else max(block, room // block * block)


def _check_whole(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{name}: {value!r} given; it must be a whole number of at least 1")


def _nearest(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} and {below + divisor}" if below else str(divisor)


@dataclass(frozen=True)
class Generation:
    """The answers to a batch of prompts. Lists run over prompts, then over the tokens of the answer.

    Args:
        prompts: The ids of each prompt.
        tokens: The ids of each answer, up to and with the token that ended it; of filled gaps those of the whole text.
        text: The text of each answer, special tokens and what follows a stop string left out; None without a tokenizer.
        step_of_token: The sampling step, from 1, at which each token appeared; 0 for a token that was given; -1 for a
            [MASK] that the released sampler drew and left.
        confidence: The probability that the model gave each token when it appeared (before temperature, top-k and
            top-p; after guidance); 1 for a token that was given.
        finish: What ended each answer: a token of the model, a stop string, or the length.
        steps: The largest number of steps that an answer took; that of the schedule is in ``settings``.
        forward_passes: The number of passes of the model over (what was left of) the batch. With guidance one pass
            holds each sequence twice, with and without its prompt, and so costs what two do. On CUDA the end of an
            answer is known one step later than on a CPU, which may cost one pass.
        seconds: The wall-clock time of the sampling.
        cache: The cache: `none` (exact), `kv` (exact, of `arm` and `block`), `prefix` or `dual` (approximate).
        settings: The settings as they ran (:class:`Sampling`), and the number of the first prompt.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    text: list[str] | None
    step_of_token: list[list[int]]
    confidence: list[list[float]]
    finish: list[Finish]
    steps: int
    forward_passes: int
    seconds: float
    cache: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """The number of tokens that were made, not given, per second of wall-clock time."""
        return sum(step != 0 for steps in self.step_of_token for step in steps) / self.seconds

    @property
    def facts(self) -> str:
        """One line: how the answers were sampled, how fast, and what ended them."""
        run = Sampling(**{name: value for name, value in self.settings.items() if name != "first"})
        parts, speed = [str(run.strategy)], self.tokens_per_second
        if run.strategy != "autoregressive":
            if run.block_length != run.length:
                parts.append(f"blocks of {run.block_length}")
            if run.strategy != "ancestral":
                parts.append(run.remasking)
            elif run.kappa != 1:
                parts.append(f"kappa {run.kappa:g}")
            parts.append(f"{self.steps} steps" if run.threshold is None else f"threshold {run.threshold:g}")
        parts += [
            f"{self.forward_passes} forward passes{' (each with and without the prompt)' if run.cfg_scale > 0 else ''}",
            f"{speed:,.0f} tokens/s" if speed >= 100 else f"{speed:.3g} tokens/s",
            f"cache {self.cache}{' (approximate)' if self.cache in ('prefix', 'dual') else ''}",
        ]
        if run.compat is not None:
            parts.append(f"compat {run.compat}")
        if not run.infill:  # a gap ends where it ends
            kinds = list(dict.fromkeys(self.finish))
            counts = kinds if len(kinds) == 1 else [f"{self.finish.count(kind)} {kind}" for kind in kinds]
            parts.append(f"finish {' '.join(counts)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Snapshot:
    """The answers half-way, as the fields of :class:`Generation`: a [MASK] has step -1.

    ``step`` of ``steps`` are done. ``first`` is the number of the first list's prompt.
    """

    tokens: list[list[int]]
    step_of_token: list[list[int]]
    step: int
    steps: int
    first: int = 0


Observer = Callable[[Snapshot], None]
