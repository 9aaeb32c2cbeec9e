"""A multiple-choice set scored as the released loop does, and by ours at equal standard error: requests a CPU second.

The reference is a plain re-implementation of the released way of working: one request at a time, batches of 32 masked
copies, logits of every position, independent l, 128 samples. What each part of ours gives is shown step by step. The
error of all requests is the root of their mean variance: the reference's from its own samples (they are independent),
ours from the scatter over repeated seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llada_lightning.checkpoints.language_model import LanguageModel
from llada_lightning.compute.shapes import get_shape
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.ranking import rank_candidates
from llada_lightning.evaluation.requests import Score
from llada_lightning.evaluation.scorer import ScoredInput, Scorer, ScoringProgress
from llada_lightning.model import Transformer

SAMPLES, BATCH = 128, 32
Question = tuple[list[int], list[list[int]]]
Request = tuple[list[int], list[int]]


def random_model(shape: str, words: int, device: str) -> LanguageModel:
    """Random weights; the head is scaled so that the predictions are not flat."""
    model = Transformer(get_shape(shape), words)
    model.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight *= 4
    name = f"random, {model.shape.params_total(words):,} parameters"
    return LanguageModel("llada", model.eval(), words - 1, words - 2, 2048, name=name).to(device)


def question_set(lm: LanguageModel, number: int, text: list[int] | None) -> list[Question]:
    """Prompts of 16 to 48 tokens, four candidates each of 1 to 24: pieces of a text, or random words."""
    rng = np.random.default_rng(0)

    def piece(length: int) -> list[int]:
        if text is None:
            return rng.integers(0, lm.model.vocab_size - 2, length).tolist()
        start = rng.integers(0, len(text) - length)
        return text[start : start + length]

    lengths = rng.integers(1, 25, size=(number, 4))
    return [(piece(int(rng.integers(16, 49))), [piece(int(n)) for n in row]) for row in lengths]


def independent_masks(rng: np.random.Generator, length: int, samples: int = SAMPLES) -> np.ndarray:
    """(samples, L) masks as Algorithm 3 draws them: l uniform on 1..L, then l positions."""
    counts_N = rng.integers(1, length + 1, size=samples)
    places_NL = np.argsort(np.argsort(rng.random((samples, length)), axis=1), axis=1)
    return places_NL < counts_N[:, None]


@torch.inference_mode()
def released_loop(lm: LanguageModel, request: Request, rng: np.random.Generator) -> np.ndarray:
    """(128,) samples of Eq. 6 with its sign changed, the released way."""
    assert lm.mask_token_id is not None
    prompt, answer = torch.tensor(request[0], device=lm.device), torch.tensor(request[1], device=lm.device)
    values = []
    for masks_BL in np.split(independent_masks(rng, len(answer)), SAMPLES // BATCH):
        masked_BL = torch.from_numpy(masks_BL).to(lm.device)
        noisy_BL = torch.where(masked_BL, lm.mask_token_id, answer)
        logits_BTV = lm.model(torch.cat([prompt.expand(BATCH, -1), noisy_BL], dim=1), causal=False).float()
        if lm.excluded_token_id is not None:
            logits_BTV[:, :, lm.excluded_token_id] = -torch.inf
        log_p_BLV = logits_BTV[:, len(prompt) :].log_softmax(-1)
        log_p_BL = log_p_BLV.gather(-1, answer.expand(BATCH, -1)[..., None])[..., 0]
        values.append((log_p_BL * masked_BL).sum(1) * len(answer) / masked_BL.sum(1))
    return torch.cat(values).double().cpu().numpy()


def masked_rows(lm: LanguageModel, request: Request, masks_NL: np.ndarray) -> list[ScoredInput]:
    prompt, answer = np.array(request[0]), np.array(request[1])
    return [
        ScoredInput(
            np.concatenate([prompt, np.where(mask_L, lm.mask_token_id, answer)]),
            len(prompt) + mask_L.nonzero()[0],
            answer[mask_L],
        )
        for mask_L in masks_NL
    ]


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of the process on a CPU, so that other work on the machine counts less; of the clock on a GPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def root_mean_square(errors: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def estimated_error(scores: list[Score]) -> float:
    return root_mean_square([score.stderr for score in scores])


def scatter(lm: LanguageModel, requests: list[Request], samples: int, repeats: int) -> float:
    """Root of the mean variance of a score over seeds."""
    means = [[score.mean for score in log_likelihood(lm, requests, samples, seed=seed)] for seed in range(repeats)]
    return root_mean_square(np.std(means, axis=0, ddof=1).tolist())


def compare(lm: LanguageModel, questions: list[Question], repeats: int) -> dict[str, Any]:
    requests = [(prompt, candidate) for prompt, candidates in questions for candidate in candidates]
    number = len(requests)
    released_loop(lm, requests[0], np.random.default_rng(0))  # warm up
    rng = np.random.default_rng(1)
    reference_seconds, values = timed(lambda: [released_loop(lm, r, rng) for r in requests], lm.device)
    reference_error = root_mean_square([float(v.std(ddof=1)) / np.sqrt(SAMPLES) for v in values])
    steps = [("released loop, 128 samples", reference_seconds, reference_error)]

    rng = np.random.default_rng(1)
    rows = [masked_rows(lm, r, independent_masks(rng, len(r[1]))) for r in requests]
    with ScoringProgress() as bar:
        for name, groups in (
            ("  + logits at masked positions only", rows),
            ("  + batched across requests", [[row for group in rows for row in group]]),
        ):
            scorers = [Scorer(lm, 0.0, BATCH * len(g[0].tokens) if len(groups) > 1 else None, bar) for g in groups]
            work = [scorer.log_probs for scorer in scorers]
            seconds, _ = timed(lambda g=groups, w=work: [one(part) for one, part in zip(w, g, strict=True)], lm.device)
            steps.append((name, seconds, reference_error))

    seconds, scores = timed(lambda: log_likelihood(lm, requests, SAMPLES), lm.device)
    steps.append(("ours, 128 samples", seconds, estimated_error(scores)))
    needed = SAMPLES * (estimated_error(scores) / reference_error) ** 2  # a first guess, checked by repeats
    for samples in (n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n >= needed):
        error = scatter(lm, requests, samples, repeats)
        if error <= reference_error:
            break
    seconds, scores = timed(lambda: log_likelihood(lm, requests, samples), lm.device)
    steps.append((f"ours, {samples} samples: equal error", seconds, error))
    exact = sum(score.exact for score in scores)

    seconds, rankings = timed(lambda: rank_candidates(lm, questions, 0.99), lm.device)
    settled = sum(ranking.settled for ranking in rankings)
    best = iter([float(v.mean()) for v in values])
    agree = sum(int(np.argmax([next(best) for _ in r.scores])) == r.best for r in rankings)
    return {
        "model": lm.name,
        "device": torch.cuda.get_device_name() if lm.device.type == "cuda" else "CPU, one thread",
        "torch": torch.__version__,
        "requests": number,
        "exact_at_equal_error": exact,
        "steps": [
            {
                "name": name,
                "seconds": seconds,
                "requests_per_second": number / seconds,
                "rms_stderr": error,
                "ratio": reference_seconds / seconds,
                "ratio_at_equal_error": reference_seconds / seconds * (reference_error / max(error, 1e-12)) ** 2,
            }
            for name, seconds, error in steps
        ],
        "ranking": {
            "seconds": seconds,
            "ratio": reference_seconds / seconds,
            "questions": len(questions),
            "settled_at_0.99": settled,
            "same_best_as_reference": agree,
        },
    }


def report(result: dict[str, Any]) -> None:
    print(f"{result['model']}; {result['device']}; torch {result['torch']}; {result['requests']} requests")
    print(f"{'':40}{'requests/s':>12}{'error, nats':>13}{'ratio':>8}{'ratio x (error ratio)^2':>26}")
    for step in result["steps"]:
        print(
            f"{step['name']:40}{step['requests_per_second']:12.2f}{step['rms_stderr']:13.4f}{step['ratio']:8.1f}"
            f"{step['ratio_at_equal_error']:26.1f}"
        )
    ranking = result["ranking"]
    print(
        f"{'rankings settled at 0.99':40}{result['requests'] / ranking['seconds']:12.2f}{'':13}{ranking['ratio']:8.1f}"
        f"    settled {ranking['settled_at_0.99']} of {ranking['questions']}; same best as the reference: "
        f"{ranking['same_best_as_reference']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="a llada checkpoint instead of random weights")
    parser.add_argument("--text", type=Path, help="with a checkpoint: a text that prompts and candidates are cut from")
    parser.add_argument("--shape", default="1.28m", help="of random weights")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="of random weights")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=6, help="seeds that our error is measured over")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = None
    if arguments.checkpoint:
        from llada_lightning.checkpoints.language_model import load_model

        lm = load_model(arguments.checkpoint, device=arguments.device)
        text = lm.encode(arguments.text.read_text()) if arguments.text else None
    else:
        lm = random_model(arguments.shape, arguments.vocab_size, arguments.device)
    result = compare(lm, question_set(lm, arguments.questions, text), arguments.repeats)
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
