"""The sampler's settings, and what of them does not go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.support.errors import UserError

Strategy = Literal["diffusion", "block_diffusion", "autoregressive"]
Remasking = Literal["low_confidence", "margin", "entropy", "random", "random_count"]
Cache = Literal["none", "kv", "prefix", "dual"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
REMASKINGS: tuple[Remasking, ...] = get_args(Remasking)
CACHES: tuple[Cache, ...] = get_args(Cache)

DEFAULT_LENGTH = 128
"""Of an answer, in tokens, where the context has room for it."""


@dataclass(frozen=True)
class Settings:
    """How answers are sampled; :func:`resolve_settings` fills in what follows from the rest.

    Args:
        length: tokens of an answer at most; of `diffusion` exactly, EOS and what follows it included.
        steps: of the whole generation, spread evenly over the blocks; None where a threshold decides, or where each
            text with gaps has as many as gaps.
        block_length: tokens that are denoised together; blocks follow one another from left to right.
        strategy: `diffusion`: of fixed length, pure where one block spans it, else block diffusion LLaDA;
            `block_diffusion`: grows block by block until EOS; `autoregressive`: grows token by token (paper, Fig. 4).
        remasking: which predictions stay at the end of a step. Those of the highest probability (`low_confidence`,
            Algorithm 5), the widest margin to the second word, the lowest entropy, of what is equal within 1e-5 of
            the highest the first; or by chance: each with the probability of the reverse process (`random`,
            Algorithm 4), or the scheduled number (`random_count`).
        temperature: of the Gumbel noise, up to 1e4; 0 takes the likeliest token.
        top_k, top_p: tokens to draw from: the k likeliest, the likeliest that hold the share p.
        cfg_scale: w of unsupervised classifier-free guidance (Eq. 16).
        threshold: keep every prediction of more confidence than this, at least one a step, instead of a schedule.
        zero_eos_confidence: predictions of EOS are kept last (paper, B.4).
        stop: strings that end an answer.
        infill: the prompts hold [MASK]s, and these are what is filled.
        cache: of keys and values. `kv`: of `arm`, exact. `prefix`, `dual`: what stands before a block, or before and
            behind it, is computed once a block: approximate.
        compat: `llada` samples as the authors' released code does.
    """

    length: int
    steps: int | None
    block_length: int
    strategy: Strategy
    remasking: Remasking
    temperature: float
    top_k: int | None
    top_p: float | None
    cfg_scale: float
    threshold: float | None
    zero_eos_confidence: bool
    stop: tuple[str, ...]
    infill: bool
    cache: Cache
    compat: Literal["llada"] | None

    @property
    def grows(self) -> bool:
        return self.strategy != "diffusion"

    @property
    def steps_per_block(self) -> int | None:
        return None if self.steps is None else self.steps // (self.length // self.block_length)

    @property
    def most_steps(self) -> int:
        """As many as there can be."""
        return self.length if self.steps is None else self.steps

    @property
    def random(self) -> bool:
        return self.remasking in ("random", "random_count")


def resolve_settings(
    lm: LanguageModel,
    *,
    length: int,
    steps: int | None,
    block_length: int | None,
    strategy: Strategy | None,
    remasking: Remasking,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    cfg_scale: float,
    threshold: float | None,
    zero_eos_confidence: bool,
    stop: str | Sequence[str] | None,
    infill: bool,
    cache: Cache | None,
    compat: Literal["llada"] | None,
) -> Settings:
    """Settings for a model, checked.

    Raises:
        UserError: a value is out of its range, or two settings do not go together.
    """
    strategy = strategy or ("autoregressive" if lm.causal else "diffusion")
    _among("strategy", strategy, STRATEGIES)
    _among("remasking", remasking, REMASKINGS)
    cache = cache or ("kv" if lm.causal else "none")
    _among("cache", cache, CACHES)
    if compat is not None:
        _among("compat", compat, ("llada",))
    _whole("length", length)
    if strategy == "autoregressive":
        if block_length not in (None, 1, length):
            raise UserError(
                f"block_length: {block_length} given; autoregressive sampling takes one token at a time; leave it out"
            )
        if steps not in (None, length):
            raise UserError(
                f"steps: {steps} given; autoregressive sampling takes {length}, one for each token; leave it out"
            )
        block_length = 1
    unsaid = block_length is None
    if infill and block_length is not None:
        raise UserError(f"block_length: {block_length} given; infilling takes all gaps of a text together")
    block_length = _whole("block_length", length if block_length is None else block_length)
    if length % block_length:
        raise UserError(
            f"block_length: {block_length} does not divide length {length}; the nearest lengths are "
            f"{_nearest(length, block_length)}"
        )
    settings = Settings(
        length=length,
        steps=None if steps is None and (infill or threshold is not None) else _steps(steps, length, block_length),
        block_length=block_length,
        strategy=strategy,
        remasking=remasking,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        cfg_scale=cfg_scale,
        threshold=threshold,
        zero_eos_confidence=zero_eos_confidence,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        infill=infill,
        cache=cache,
        compat=compat,
    )
    _check_ranges(settings)
    if steps is not None and threshold is not None:
        raise UserError(f"steps: {steps} given with threshold {threshold}, which decides their number; leave one out")
    _check_stop(settings.stop, lm)
    (_check_arm if lm.causal else _check_llada)(settings, lm)
    if strategy == "block_diffusion" and unsaid:
        raise UserError(
            "block_length: not given; block_diffusion grows by so many tokens at a time; give 32, as the paper"
        )
    return settings


def default_length(room: int, block_length: int | None) -> int:
    """The length of an answer where none is given: what the room leaves of 128 tokens, in whole blocks, at least one.

    Raises:
        UserError: the blocks have no length.
    """
    block = 1 if block_length is None else _whole("block_length", block_length)
    return DEFAULT_LENGTH if room >= DEFAULT_LENGTH else max(block, room // block * block)


def _check_stop(stop: tuple[str, ...], lm: LanguageModel) -> None:
    if not stop:
        return
    if lm.tokenizer is None:
        raise UserError(f"stop: {stop[0]!r} given, but '{lm.name}' has no tokenizer that could spell it")
    special = [token.content for token in lm.tokenizer.get_added_tokens_decoder().values() if token.special]
    for text in stop:
        if any(word in text for word in special):
            raise UserError(
                f"stop: {text!r} holds a special token, which is never part of an answer's text; leave it out (the "
                "end of a text ends an answer by itself)"
            )


def _steps(steps: int | None, length: int, block_length: int) -> int:
    """Steps of the whole generation; by default one for each token."""
    if steps is None:
        return length
    blocks = length // block_length
    if _whole("steps", steps) % blocks:
        raise UserError(
            f"steps: {steps} do not divide evenly into {blocks} blocks; the nearest are {_nearest(steps, blocks)}"
        )
    return steps


def _nearest(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} and {below + divisor}" if below else str(divisor)


def _among(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}: '{value}' is not known; choose from {', '.join(choices)}")


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}: {value!r} given; it must be a whole number of at least 1")
    return value


def _check_ranges(settings: Settings) -> None:
    if not 0 <= settings.temperature <= 1e4:
        raise UserError(f"temperature: {settings.temperature} given; it must lie between 0 (greedy) and 1e4")
    if settings.top_k is not None:
        _whole("top_k", settings.top_k)
    for name, share in (("top_p", settings.top_p), ("threshold", settings.threshold)):
        if share is not None and not 0 < share <= 1:
            raise UserError(f"{name}: {share} given; it must lie in (0, 1]")
    if not (math.isfinite(settings.cfg_scale) and settings.cfg_scale >= 0):
        raise UserError(f"cfg_scale: {settings.cfg_scale} given; it must be 0 (no guidance) or above")
    if settings.temperature == 0 and (settings.top_k is not None or settings.top_p is not None):
        name = "top_p" if settings.top_k is None else "top_k"
        raise UserError(
            f"{name}: {getattr(settings, name)} does nothing at temperature 0, which takes the likeliest token; give a "
            "temperature above 0, or leave it out"
        )
    if any(not isinstance(text, str) or not text for text in settings.stop):
        raise UserError("stop: an empty string is in every text; give strings of at least one character")


def _check_arm(settings: Settings, lm: LanguageModel) -> None:
    """`arm` can only go from left to right."""
    foreign = {
        f"strategy '{settings.strategy}'": settings.strategy != "autoregressive",
        "infill": settings.infill,
        f"cfg_scale {settings.cfg_scale}": settings.cfg_scale > 0,
        f"threshold {settings.threshold}": settings.threshold is not None,
        f"remasking '{settings.remasking}'": settings.remasking != "low_confidence",
        "zero_eos_confidence": settings.zero_eos_confidence,
        f"cache '{settings.cache}'": settings.cache not in ("none", "kv"),
        "compat 'llada'": settings.compat is not None,
    }
    for name, given in foreign.items():
        if given:
            raise UserError(f"{name}: '{lm.name}' is an arm, which writes one token after the other; leave it out")


def _check_llada(settings: Settings, lm: LanguageModel) -> None:
    if settings.cache == "kv":
        raise UserError("cache: 'kv' is exact under causal attention only; llada has prefix and dual (approximate)")
    foreign_to_infill = {
        f"strategy '{settings.strategy}'": settings.grows,
        f"cache '{settings.cache}'": settings.cache != "none",
        f"stop {settings.stop}": bool(settings.stop),
    }
    for name, given in foreign_to_infill.items():
        if settings.infill and given:
            raise UserError(f"{name}: infilling denoises all of a given text, without caches; leave it out")
    if settings.random and (settings.zero_eos_confidence or settings.threshold is not None):
        name = "zero_eos_confidence" if settings.zero_eos_confidence else "threshold"
        raise UserError(f"{name}: remasking '{settings.remasking}' knows no confidence; take low_confidence")
    if settings.threshold is not None and settings.remasking == "entropy":
        raise UserError("threshold: a probability or a margin has one, an entropy has not; take low_confidence")
    if settings.compat is not None:
        _check_compat(settings)


def _check_compat(settings: Settings) -> None:
    """The released sampler has no more than this."""
    foreign = {
        f"strategy '{settings.strategy}'": settings.grows,
        f"remasking '{settings.remasking}'": settings.remasking in ("margin", "entropy"),
        f"top_k {settings.top_k}": settings.top_k is not None,
        f"top_p {settings.top_p}": settings.top_p is not None,
        f"threshold {settings.threshold}": settings.threshold is not None,
        f"cache '{settings.cache}'": settings.cache != "none",
        "stop": bool(settings.stop),
        "infill": settings.infill,
    }
    for name, given in foreign.items():
        if given:
            raise UserError(
                f"{name}: the released sampler, which compat 'llada' repeats, has no such thing; leave it out"
            )
