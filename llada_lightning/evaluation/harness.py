"""Models of ours for lm-evaluation-harness: both objectives, every kind of checkpoint.

Importing this imports lm_eval, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor, stack

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.data.chat import Message
from llada_lightning.data.encoding import decode
from llada_lightning.evaluation.likelihood import document_log_likelihoods, log_likelihood
from llada_lightning.evaluation.policy import Policy
from llada_lightning.evaluation.requests import encode_pair, encode_text, encode_with_gap
from llada_lightning.evaluation.scorer import ScoringProgress
from llada_lightning.evaluation.suites import MONTE_CARLO
from llada_lightning.generation.prompts import conversation_ids
from llada_lightning.generation.sampler import generate
from llada_lightning.generation.sampling import (
    OF_EVERY_STRATEGY,
    Generation,
    Sampling,
    default_length,
    only_left_to_right,
    spelled_specials,
)
from llada_lightning.support.cluster import launched
from llada_lightning.support.errors import UserError

TASK_LENGTH = 256
"""The tokens of an answer where neither the task nor the user sets them: as lm-evaluation-harness's own models."""

_INFILL_LACKS = frozenset({"length", "steps", "block_length", "stop", "strategy", "cache"})


class HarnessModel(LM):
    """A :class:`LanguageModel` as lm-evaluation-harness asks it.

    `loglikelihood` gives log p for `arm` and the lower bound of Eq. 6 for `llada`, or its log p under a decoding
    policy, and whether greedy decoding gives the continuation. For a masked diffusion model that has no one meaning.
    Here as in the released evaluation: with the continuation's length known, one token a step, the most confident
    first. It costs as many passes as tokens, and no multiple choice reads it, so it is only computed with ``greedy``;
    otherwise it is False.

    Beside the keys of lm-evaluation-harness, `generation_kwargs` of a task may hold three of ours. ``truncate: false``:
    a prompt that does not fit is refused instead of cut, and an answer may take all the room that the prompts leave.
    ``length_of: FIELD``: an answer gets as many tokens as this field of its document has, where it is not empty.
    ``infill: true``: `llada` fills a gap, and `arm` is refused.

    Args:
        lm: The model, which needs a tokenizer.
        monte_carlo: The number of masks of each continuation of several tokens; the value of others is exact.
        sampling: The settings that take precedence over those of a task, an object or by their names. Those that `arm`
            cannot have are left out for it. `length` replaces the task's `max_gen_toks`.
        infill: Whether `llada` fills the gap between the fields `prompt` and `suffix` of a document (texts, or lists of
            texts that are encoded one by one) with as many tokens as its `canonical_solution` has. An `arm` continues.
        greedy: Whether greedy decoding is tried in `loglikelihood`.
        cfg_scale: The scale w of classifier-free guidance (Eq. 16) in likelihoods.
        policy: The decoding policy whose exact likelihood is taken, instead of the bound; None: the bound. A
            continuation of fewer tokens than a step reveals is decoded in one step.
        seed: The seed of masks and of samples.
        batch_size: The number of prompts sampled together.
        batch_tokens, progress: As of :func:`likelihood.log_likelihood`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        monte_carlo: int = MONTE_CARLO,
        sampling: Sampling | Mapping[str, Any] | None = None,
        infill: bool = False,
        greedy: bool = False,
        cfg_scale: float = 0.0,
        policy: Policy | None = None,
        seed: int = 0,
        batch_size: int = 8,
        batch_tokens: int | None = None,
        progress: bool | None = False,
    ) -> None:
        super().__init__()
        for name, count in (("monte_carlo", monte_carlo), ("batch_size", batch_size)):
            if count < 1:
                raise UserError(f"{name} is {count}; it must be at least 1")
        lm.encode("")  # raises where there is no tokenizer
        if policy is not None:
            policy.check(lm.facts, lm.context_length)
        self.lm, self.sampling, self.infill, self.greedy = lm, said(sampling), infill, greedy
        self.batch_size, self.progress, self.seed = batch_size, progress, seed
        self.scoring: dict[str, Any] = {
            "samples": monte_carlo, "cfg_scale": cfg_scale, "policy": policy, "seed": seed,
            "batch_tokens": batch_tokens, "progress": progress,
        }  # fmt: skip
        self._device = lm.device
        self._chats: dict[str, list[int]] = {}
        self.lost_share = 0.0
        self.used: list[dict[str, Any]] = []
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    # --- likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(nats, greedy) of each (context, continuation); contexts that do not fit are cut at their left."""
        pairs = [self._pair(request.args[0], request.args[1], _named(request)) for request in requests]
        scores = log_likelihood(self.lm, pairs, truncate="left", **self.scoring)
        greedy = self._greedy(pairs) if self.greedy else [False] * len(pairs)
        return [(score.mean, flag) for score, flag in zip(scores, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Nats of each text, in disjoint windows of the context length.

        The harness divides them by the bytes and words of the text as it is, which :attr:`lost_share` puts in doubt.
        """
        written = [request.args[0] for request in requests]
        texts = [encode_text(self.lm, request.args[0], _named(request)) for request in requests]
        lost = sum(map(self.lm.lost_bytes, written)) / max(1, sum(len(text.encode()) for text in written))
        self.lost_share = max(self.lost_share, lost)
        return document_log_likelihoods(self.lm, texts, **self.scoring)

    def _pair(self, context: str, continuation: str, name: str = "request") -> tuple[list[int], list[int]]:
        return encode_pair(self.lm, self._chats.get(context, context), continuation, name)

    def _greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        flags = [not continuation for _, continuation in pairs]
        for length in sorted({len(continuation) for _, continuation in pairs} - {0}):
            members = [i for i, (_, continuation) in enumerate(pairs) if len(continuation) == length]
            prompts = [self._fitting(pairs[i][0], length) for i in members]
            answers = generate(self.lm, prompts, length=length, batch_size=self.batch_size).tokens
            for i, answer in zip(members, answers, strict=True):
                flags[i] = answer == pairs[i][1]
        return flags

    # --- answers ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each (context, settings), up to the first stop string; :attr:`used` gets the settings."""
        groups: dict[str, list[int]] = {}  # of requests that share their settings
        for i, request in enumerate(requests):
            key = f"{request.args[1]!r} {self._fills(request)} {self._answer_length(request)}"
            groups.setdefault(key, []).append(i)
        answers = [""] * len(requests)
        with ScoringProgress(self.progress, "answers") as bar:
            bar.expect(len(requests))
            for members in groups.values():
                group, places = [requests[i] for i in members], iter(members)
                for texts in self._filled(group) if self._fills(group[0]) else self._answered(group, members):
                    for text in texts:
                        answers[next(places)] = text
                    bar.advance(len(texts))
        return answers

    def _answer_length(self, request: Instance) -> int | None:
        """Tokens of the right answer, where the task gives an answer just these."""
        field = request.args[1].get("length_of")
        answer = request.doc[field] if field and not self._fills(request) else ""
        return len(self._pair(request.args[0], answer, _named(request))[1]) if answer else None

    def _answered(self, requests: Sequence[Instance], numbers: Sequence[int]) -> Iterator[list[str]]:
        """The answers to requests that share their settings, a batch at a time."""
        task = requests[0].args[1]
        prompts = [self._prompt(request.args[0]) for request in requests]
        settings = self.settings(task, self._answer_length(requests[0]), max(map(len, prompts)))
        longest = max(map(len, prompts))
        if not task.get("truncate", True) and longest >= self.lm.context_length:
            raise UserError(
                f"task '{requests[0].task_name}': a prompt of {longest} tokens leaves no room for an answer, as "
                f"'{self.lm.name}' was trained on {self.lm.context_length}; give fewer --shots, or a "
                "checkpoint with a longer context (igsm also takes --metadata system=false)"
            )
        if task.get("truncate", True):
            prompts = [self._fitting(prompt, settings["length"]) for prompt in prompts]
        self._remember(settings)
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            text = self._generate(batch, first=numbers[start], **settings).text
            assert text is not None  # a harness model has a tokenizer
            yield text

    def settings(
        self, task: Mapping[str, Any], answer_length: int | None = None, longest_prompt: int = 0
    ) -> dict[str, Any]:
        """The keyword arguments of ``generate`` for a task, from its `generation_kwargs`.

        An answer takes at most half of the context, so that its prompt has room. Stop strings that hold a special token
        are left out: no answer's text does.

        Args:
            task: The `generation_kwargs`.
            answer_length: The number of tokens of an answer, where the task fixes it.
            longest_prompt: The number of tokens of the longest prompt, for tasks that refuse to cut one.
        """
        settings: dict[str, Any] = {}
        if task.get("max_gen_toks"):
            settings["length"] = int(task["max_gen_toks"])
        if task.get("do_sample"):
            settings |= {name: task[name] for name in ("top_k", "top_p") if task.get(name) is not None}
            settings["temperature"] = float(task.get("temperature") or 1.0)
        causal = only_left_to_right(self.lm)
        settings |= {name: v for name, v in self.sampling.items() if not causal or name in OF_EVERY_STRATEGY}
        if answer_length is not None:
            settings["length"] = answer_length
        elif not task.get("truncate", True):
            room = self.lm.context_length - longest_prompt
            settings.setdefault("length", default_length(room, settings.get("block_length")))
        else:  # half of the context at most, and no more steps than tokens
            settings.setdefault("length", TASK_LENGTH)
            block = settings.get("block_length") or 1
            most = max(block, self.lm.context_length // 2 // block * block)
            if settings["length"] > most:
                settings["length"] = most
                if settings.get("steps") is not None:
                    settings["steps"] = min(settings["steps"], most)
        until = task.get("until") or []
        stops = [*([until] if isinstance(until, str) else until), *settings.get("stop", ())]
        special = spelled_specials(self.lm)
        return settings | {"stop": [text for text in stops if text and not any(token in text for token in special)]}

    def _remember(self, settings: Mapping[str, Any]) -> None:
        used = {name: value for name, value in settings.items() if name != "stop" and value is not None}
        if not only_left_to_right(self.lm) and "threshold" not in used:
            used.setdefault("steps", used["length"])
        self.used.append(used)

    def _generate(self, prompts: list[list[int]], **settings: Any) -> Generation:
        if settings.get("compat") is not None:  # the released sampler draws from torch's generator
            torch.manual_seed(self.seed)
        return generate(self.lm, prompts, **{"seed": self.seed, **settings})

    def _fills(self, request: Instance) -> bool:
        wanted = request.args[1].get("infill", False)
        if wanted and not self.lm.facts.masks:
            why = "sees nothing behind a gap" if only_left_to_right(self.lm) else "has no [MASK] to fill"
            raise UserError(
                f"task '{request.task_name}': '{self.lm.name}' is an {self.lm.objective}, which {why}; take a task "
                "without infill"
            )
        return (wanted or self.infill) and self.lm.facts.masks and "suffix" in request.doc

    def _filled(self, requests: Sequence[Instance]) -> Iterator[list[str]]:
        """What is between prompt and suffix, a batch at a time."""
        settings = {k: v for k, v in self.sampling.items() if k not in _INFILL_LACKS}
        fields = [[request.doc[name] for name in ("prompt", "canonical_solution", "suffix")] for request in requests]
        gapped = [encode_with_gap(self.lm, *each) for each in fields]
        for gap in dict.fromkeys(gap.stop - gap.start for _, gap in gapped):
            self._remember({**settings, "length": gap})
        for start in range(0, len(gapped), self.batch_size):
            texts, gaps = zip(*gapped[start : start + self.batch_size], strict=True)
            filled = self._generate(list(texts), infill=True, **settings).tokens
            yield [self.lm.decode(tokens[gap]) for tokens, gap in zip(filled, gaps, strict=True)]

    def _prompt(self, context: str) -> list[int]:
        return self._chats.get(context) or self.lm.encode_prompt(context)

    def _fitting(self, prompt: list[int], length: int) -> list[int]:
        """The prompt's right part that leaves room for an answer; the prefix of texts stays in front.

        A Llama that is given nothing begins with its BOS.
        """
        prefix = list(self.lm.text_prefix_ids)
        if not prompt and only_left_to_right(self.lm) and self.lm.start_token_id is None:
            return (prefix or [self.lm.eos_token_id])[:1]
        excess = len(prompt) + length - self.lm.context_length
        if excess <= 0:
            return prompt
        kept = prefix if prompt[: len(prefix)] == prefix else []
        return kept + prompt[len(kept) + excess :]

    # --- chat ---------------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation as a text, whose ids are kept aside.

        The text is for people and for the harness's records: read back, what a message spells could become a special
        token. Without ``add_generation_prompt`` the last message begins the answer.
        """
        if self.lm.chat_template is None:
            raise UserError(f"'{self.lm.name}' has no chat template; leave --chat out, or take a chat model")
        said, begun = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        messages = [Message(message["role"], message["content"]) for message in said]  # type: ignore[arg-type]
        ids = conversation_ids(self.lm, messages) + self.lm.encode_within(begun)
        assert self.lm.tokenizer is not None  # or there were no ids
        text = decode(self.lm.tokenizer, ids, skip_special_tokens=False)
        self._chats[text] = ids
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The checkpoint's template, for the harness's records."""
        return (self.lm.chat_template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and its template in the harness's cache of requests."""
        return self.lm.name.replace("/", "__")

    # --- several processes --------------------------------------------------------------------------------------------

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The scalars of all processes, one behind the other."""
        if self.world_size == 1:
            return tensor
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, tensor.cpu())
        return stack(found)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, on one of them."""
        if self.world_size == 1:
            return [obj]
        found: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier()


def join_processes(device: str | None) -> str | None:
    """The device of this process (None: the default), once it has joined those that torchrun started."""
    launch = launched()
    if launch is None or launch.processes == 1:
        return device
    if launch.launcher != "torchrun":
        raise UserError(f"evaluate: {launch.launcher} started {launch.processes} processes; start them by torchrun")
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # only scores go over it
    return f"cuda:{launch.local_rank}" if device is None and torch.cuda.is_available() else device


def said(sampling: Sampling | Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that take precedence over those of a task, by their names."""
    return sampling.changes if isinstance(sampling, Sampling) else dict(sampling or {})


def _named(request: Instance) -> str:
    """A request, for messages."""
    return f"task '{request.task_name}', document {request.doc_id}, request {request.idx}"
