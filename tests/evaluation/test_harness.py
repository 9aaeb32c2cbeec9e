"""Our models in lm-evaluation-harness: its accuracies are those of a direct computation, and of its own model."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.local_tasks import QUESTIONS, answer_task, choice_task

pytest.importorskip("lm_eval")

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from helpers.small_checkpoints import tokenizer_folder, written
from llada_lightning.checkpoints.language_model import LanguageModel, load_model
from llada_lightning.evaluation.benchmarks import OUR_TASKS, load_benchmark, measure, runs_code, task_manager
from llada_lightning.evaluation.harness import HarnessModel
from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.policy import Policy
from llada_lightning.evaluation.suites import SUITES, Benchmark, Outcome
from llada_lightning.generation.sampler import generate
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import warn_once

OBJECTIVES = ("arm", "llada")


@pytest.fixture(scope="module", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    root = tmp_path_factory.mktemp("models")
    tokenizer = tokenizer_folder(root / "tokenizer")
    return {name: load_model(written(root / name, "llada", name, tokenizer)) for name in OBJECTIVES}  # type: ignore[arg-type]


def asked(*arguments: Any, doc: dict[str, Any] | None = None) -> Instance:
    return Instance("loglikelihood", doc or {}, arguments, 0, ("task", 0, 1))


def outcome(model: HarnessModel, folder: Path, task: str, **options: Any) -> Outcome:
    benchmark = Benchmark(task, task)
    loaded = load_benchmark(task_manager([benchmark], folder), benchmark, unsafe_code=False)
    (result,) = measure(model, loaded, **options)
    return result


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_multiple_choice_is_the_direct_computation(models: Any, tmp_path: Path, objective: str) -> None:
    lm = models[objective]
    documents = choice_task(tmp_path)
    found = outcome(HarnessModel(lm, monte_carlo=8), tmp_path, "local_choice")
    right, right_per_byte = [], []
    for document in documents:
        prompt = lm.encode_prompt(f"{document['question']}\nAnswer:")
        pairs = [(prompt, lm.encode(f" {choice}")) for choice in document["choices"]]
        values = np.array([score.mean for score in log_likelihood(lm, pairs, 8)])
        right.append(int(values.argmax()) == document["answer"])
        lengths = np.array([len(choice) for choice in document["choices"]])
        right_per_byte.append(int((values / lengths).argmax()) == document["answer"])
    assert found.metrics["acc,none"]["value"] == np.mean(right)
    assert found.metrics["acc_norm,none"]["value"] == np.mean(right_per_byte)
    assert found.n == len(documents)
    assert found.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert (found.metric, found.is_share, found.shots) == ("acc,none", True, 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_answers_are_those_of_generate(models: Any, tmp_path: Path, objective: str) -> None:
    lm = models[objective]
    questions = [f"question {n}:" for n in range(6)]
    text = generate(lm, questions, length=8).text
    assert text is not None
    documents = [{"question": q, "answer": t if n % 3 else "no"} for n, (q, t) in enumerate(zip(questions, text))]  # noqa: B905
    answer_task(tmp_path, documents)
    found = outcome(HarnessModel(lm, batch_size=4), tmp_path, "local_answer")
    assert found.value == sum(d["answer"] == t for d, t in zip(documents, text, strict=True)) / 6 == 4 / 6


def test_limit_takes_the_first_documents(models: Any, tmp_path: Path) -> None:
    choice_task(tmp_path)
    assert outcome(HarnessModel(models["arm"]), tmp_path, "local_choice", limit=3).n == 3


def test_an_arm_agrees_with_the_harness_own_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    folder = written(tmp_path / "llama", "hf-llama", "arm", tokenizer_folder(tmp_path / "tokenizer"))
    choice_task(tmp_path / "tasks")
    # Transformers knows no token that text cannot be: it leaves [MASK] its probability.
    ours = HarnessModel(replace(load_model(folder), mask_token_id=None))
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, add_bos_token=True)
    requests = [asked(f"{d['question']}\nAnswer:", f" {c}") for d in QUESTIONS for c in d["choices"]]
    requests += [asked("white space ", "moves"), asked("", "nothing before")]
    ours.greedy = True
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for (mine, greedy), (value, their_greedy) in zip(ours.loglikelihood(requests), expected, strict=True):
        assert mine == pytest.approx(value, abs=1e-4)
        assert greedy == their_greedy
    without_mask = HarnessModel(load_model(folder)).loglikelihood(requests)
    assert all(mine > value for (mine, _), (value, _) in zip(without_mask, expected, strict=True))
    mine, their = (outcome(model, tmp_path / "tasks", "local_choice").metrics for model in (ours, theirs))  # type: ignore[arg-type]
    assert mine == their


def merging_tokenizer() -> Tokenizer:
    """Byte-level with merges, fewer ids than the models' vocabulary of 272."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["came home", "Answer: a dog", "came home, a dog"]
    tokenizer.train_from_iterator(texts * 9, BpeTrainer(vocab_size=38, show_progress=False))
    return tokenizer


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pairs_are_parted_as_in_the_harness_own_models_where_no_token_spans_the_join(
    models: Any, objective: str
) -> None:
    lm = replace(models[objective], tokenizer=merging_tokenizer())
    assert len(lm.encode(" home")) == 1
    own = SimpleNamespace(backend="causal", tok_encode=lm.encode)
    ordinary = [("came", " home"), ("came ", "home"), ("Answer:", " a dog"), ("came home", ", a dog"), ("Answer", ":")]
    for context, continuation in ordinary:
        assert HarnessModel(lm)._pair(context, continuation) == TemplateLM._encode_pair(own, context, continuation)
    # Where one does, theirs has nothing to score, and stops.
    assert TemplateLM._encode_pair(own, "came ho", "me") == (lm.encode("came ho"), [])
    assert HarnessModel(lm)._pair("came ho", "me") == (lm.encode("came ho"), lm.encode("me"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_choice_whose_token_spans_the_join_is_not_certain(models: Any, tmp_path: Path, objective: str) -> None:
    lm = replace(models[objective], tokenizer=merging_tokenizer())
    choices = ["a dog", "me", "an answer"]
    pairs = [(lm.encode("came ho"), lm.encode(choice)) for choice in choices]
    values = [score.mean for score in log_likelihood(lm, pairs, 8)]
    assert max(values) < 0
    requests = [asked("came ho", choice) for choice in choices]
    assert [value for value, _ in HarnessModel(lm, monte_carlo=8).loglikelihood(requests)] == values


def test_an_empty_choice_or_text_without_tokens_is_refused_by_name(models: Any) -> None:
    model = HarnessModel(replace(models["llada"], tokenizer=merging_tokenizer()))
    with pytest.raises(UserError, match=r"^task 'task', document 0, request 0: the continuation is empty"):
        model.loglikelihood([asked("came ", "")])
    with pytest.raises(UserError, match=r"^task 'task', document 0, request 0: the tokenizer has no token for 'XYZ'"):
        model.loglikelihood_rolling([asked("XYZ")])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_greedy_is_what_greedy_sampling_writes(models: Any, objective: str) -> None:
    lm = models[objective]
    model = HarnessModel(lm, monte_carlo=4, greedy=True)
    for seed in range(20):
        (tokens,) = generate(lm, [lm.encode_prompt(f"prompt {seed}")], length=3).tokens
        if len(tokens) == 3 and lm.encode(lm.decode(tokens)) == tokens:
            break
    requests = [asked(f"prompt {seed}", lm.decode(tokens)), asked(f"prompt {seed}", "xyz")]
    assert [flag for _, flag in model.loglikelihood(requests)] == [True, False]
    model.greedy = False
    assert [flag for _, flag in model.loglikelihood(requests)] == [False, False]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_text_beyond_the_context_is_scored_window_by_window(models: Any, objective: str) -> None:
    lm = models[objective]
    text = "a long text, " * 12
    (value,) = HarnessModel(lm, monte_carlo=4).loglikelihood_rolling([asked(text)])
    ids, length = lm.encode(text), lm.context_length
    windows = [([], ids[start : start + length]) for start in range(0, len(ids), length)]
    assert len(windows) == 3
    assert value == pytest.approx(sum(score.mean for score in log_likelihood(lm, windows, 4)))


def test_settings_of_a_task_and_of_the_user(models: Any) -> None:
    llada = HarnessModel(models["llada"], sampling={"length": 16, "steps": 16, "zero_eos_confidence": True})
    said = llada.settings({"max_gen_toks": 8, "until": ["\n", "[EOS]"], "do_sample": False})
    assert said == {"length": 16, "steps": 16, "zero_eos_confidence": True, "stop": ["\n"]}
    arm = HarnessModel(models["arm"], sampling=llada.sampling)
    assert arm.settings({"until": "Q"}) == {"length": 16, "stop": ["Q"]}
    # Half of the context, 64, at most, and no more steps than tokens.
    large = HarnessModel(models["llada"], sampling={"length": 1024, "steps": 1024, "block_length": 5})
    assert large.settings({}) | {"stop": []} == {"length": 30, "steps": 30, "block_length": 5, "stop": []}
    sampled = HarnessModel(models["arm"]).settings({"do_sample": True, "top_p": 0.9, "max_gen_toks": 4})
    assert (sampled["temperature"], sampled["top_p"], sampled["length"]) == (1.0, 0.9, 4)


def test_more_steps_than_tokens_are_said(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    warn_once.cache_clear()
    model = HarnessModel(models["llada"], sampling={"steps": 9})
    model.generate_until([asked("one", {"max_gen_toks": 4}), asked("two", {"max_gen_toks": 4})])
    assert capsys.readouterr().err.count("note: steps: 9 given for 4 tokens, and a step reveals at least one") == 1


def test_stop_strings_and_long_prompts(models: Any) -> None:
    lm = models["arm"]
    model = HarnessModel(lm)
    (whole,) = model.generate_until([asked("A prompt" * 20, {"max_gen_toks": 8})])
    (cut,) = model.generate_until([asked("A prompt" * 20, {"max_gen_toks": 8, "until": [whole[2]]})])
    assert cut == whole[: whole.index(whole[2])]


def test_infilling_sees_what_stands_behind(models: Any) -> None:
    document = {"prompt": "def f():\n", "suffix": "\n    return x\n", "canonical_solution": "    x = 1"}
    request = asked("unused", {"max_gen_toks": 8}, doc=document)
    lm = models["llada"]
    (text,) = HarnessModel(lm, infill=True).generate_until([request])
    before, behind = lm.encode(document["prompt"]), lm.encode(document["suffix"])
    tokens = generate(lm, [[*before, *[lm.mask_token_id] * 9, *behind]], infill=True).tokens[0]
    assert text == lm.decode(tokens[len(before) : len(before) + 9])
    assert tokens[len(before) + 9 :] == behind
    (continued,) = HarnessModel(models["arm"], infill=True).generate_until([request])
    assert continued == HarnessModel(models["arm"]).generate_until([request])[0]


def test_chat_prompts_keep_special_tokens_to_the_template(models: Any) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}[EOS]{% endfor %}assistant:"
    lm = replace(models["arm"], chat_template=template)
    model = HarnessModel(lm)
    text = model.apply_chat_template([{"role": "user", "content": "say [EOS]"}])
    ids = model._prompt(text)
    assert ids.count(lm.eos_token_id) == 1  # the template's; the message's stays text
    assert ids == [*lm.encode("user: say [EOS]"), lm.eos_token_id, *lm.encode("assistant:")]
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    begun = model.apply_chat_template(history, add_generation_prompt=False)
    assert model._prompt(begun)[-2:] == lm.encode("so")
    assert model._pair(text, " yes") == (ids, lm.encode(" yes"))
    with pytest.raises(UserError, match="has no chat template"):
        HarnessModel(models["arm"]).apply_chat_template([{"role": "user", "content": "hi"}])


def test_chat_prompts_are_those_of_transformers(models: Any, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content.split('</b>') | last | upper }}{{ eos_token }}{% endfor %}"
    )
    lm = replace(models["arm"], chat_template=template, special_tokens={"bos_token": "<bos>", "eos_token": "[EOS]"})
    lm.tokenizer.save(str(tmp_path / "tokenizer.json"))
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<bos>", eos_token="[EOS]", chat_template=template
    )
    history = [{"role": "user", "content": "<b>hi</b> You"}, {"role": "assistant", "content": "So"}]
    model = HarnessModel(lm)
    asked_ids = reference.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
    assert model._prompt(model.apply_chat_template(history)) == asked_ids


@pytest.mark.parametrize(("option", "value"), [("monte_carlo", 0), ("monte_carlo", -3), ("batch_size", 0)])
def test_counts_below_one_are_refused(models: Any, option: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{option} is {value}; it must be at least 1"):
        HarnessModel(models["llada"], **{option: value})


def test_a_model_without_a_tokenizer_is_refused(models: Any) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        HarnessModel(replace(models["llada"], tokenizer=None))


def test_suites_name_tasks_that_exist_with_their_metrics() -> None:
    suites = [benchmark for suite in SUITES.values() for benchmark in suite.benchmarks]
    folders = "mmlu bbh arc hellaswag truthfulqa winogrande piqa gsm8k minerva_math benchmarks gpqa humaneval mbpp"
    more = "humaneval_infilling cmmlu ceval mmlu_pro"
    tasks = Path(lm_eval.__file__).parent / "tasks"
    paths = [OUR_TASKS, *(tasks / name for name in f"{folders} {more}".split())]  # all of them take ten seconds
    manager = TaskManager(include_path=paths, include_defaults=False)
    executing = {benchmark.name for benchmark in suites if runs_code(manager, benchmark.task)}
    assert executing == {"humaneval", "humaneval_fim", "mbpp"}
    for benchmark in suites:
        config = first_task(manager, benchmark.task)
        kinds = {str(each["metric"]).split(".")[-1].replace("pass_at_k", "pass@1") for each in config["metric_list"]}
        filters = {each["name"] for each in config.get("filter_list") or [{"name": "none"}]}
        metric, _, filtered = str(benchmark.metric).partition(",")
        assert metric in kinds and filtered in filters, benchmark


def first_task(manager: TaskManager, name: str) -> dict[str, Any]:
    """The configuration of a task, or of the first one of a group or a tag."""
    entry = manager.task_index[name]
    if entry.tags and entry.cfg is None:
        return first_task(manager, min(entry.tags))
    config = entry.cfg or {}
    if "metric_list" in config:
        return config
    child = config["task"][0]
    return first_task(manager, child if isinstance(child, str) else child["task"][0])


def test_tasks_that_draw_are_the_same_every_time_and_leave_our_generators_alone(models: Any, tmp_path: Path) -> None:
    benchmark, answers = Benchmark("drawn", "drawn"), []
    random.seed(5)
    before = random.getstate()
    for folder in (tmp_path / "one", tmp_path / "two"):  # datasets remembers what it made of the first
        choice_task(folder, "drawn")
        (folder / "drawing.py").write_text(
            "import random\n"
            "def drawn(dataset):\n"
            "    def draw(doc):\n"
            "        return {**doc, 'answer': random.randrange(3)}\n"
            "    return dataset.map(draw)\n"
        )
        path = folder / "drawn.yaml"
        path.write_text(path.read_text() + "process_docs: !function drawing.drawn\n")
        loaded = load_benchmark(task_manager([benchmark], folder), benchmark, unsafe_code=False)
        measure(HarnessModel(models["arm"]), loaded)
        assert random.getstate() == before
        answers.append([document["answer"] for document in loaded.parts[0].test_docs()])
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_unknown_tasks_are_named_with_their_neighbours(tmp_path: Path) -> None:
    choice_task(tmp_path)
    manager = SimpleNamespace(all_tasks=["local_choice"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llada_lightning.evaluation.benchmarks.TaskManager", lambda **_: manager)
        with pytest.raises(UserError, match=r"task 'local_choise' is not known.*did you mean local_choice"):
            task_manager([Benchmark("x", "local_choise")], tmp_path)


def test_data_that_cannot_be_reached_say_how_to_get_them(tmp_path: Path) -> None:
    choice_task(tmp_path, "lost", dataset_kwargs={"data_files": {"test": str(tmp_path / "nowhere.jsonl")}})
    benchmark = Benchmark("lost", "lost")
    with pytest.raises(UserError, match=r"'lost': its data cannot be reached.*HF_HOME.*HF_HUB_OFFLINE=1") as refused:
        load_benchmark(task_manager([benchmark], tmp_path), benchmark, unsafe_code=False)
    assert "\n" not in str(refused.value)


def test_code_runs_on_request_only_and_in_the_sandbox(models: Any, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(
        "import evaluate\n"
        "metric = evaluate.load('code_eval')\n"
        "def pass_at_k(references, predictions, k=None):\n"
        "    return metric.compute(references=references, predictions=predictions, k=[1])[0]\n"
        "def programs(resps, docs):\n"
        "    return [[doc['program'] for _ in resp] for resp, doc in zip(resps, docs)]\n"
    )
    documents = [
        {"question": "?", "answer": "assert x == 1", "program": program} for program in ("x = 1", "x = 2", "exit()")
    ]
    answer_task(tmp_path, documents, "local_code", unsafe_code=True)
    path = tmp_path / "local_code.yaml"
    text = path.read_text()
    start = text.index("metric_list:")
    end = text.index("output_type:")
    text = text[:start] + "metric_list:\n  - metric: !function scores.pass_at_k\n    k: [1]\n    aggregation: mean\n"
    text += "    higher_is_better: true\nfilter_list:\n  - name: made\n    filter:\n      - function: custom\n"
    text += "        filter_fn: !function scores.programs\n" + path.read_text()[end:]
    path.write_text(text)
    benchmark = Benchmark("code", "local_code", "pass@1,made")
    manager = task_manager([benchmark], tmp_path)
    with pytest.raises(UserError, match="'local_code' executes what the model writes; give --unsafe-code"):
        load_benchmark(manager, benchmark, unsafe_code=False)
    loaded = load_benchmark(manager, benchmark, unsafe_code=True)
    (found,) = measure(HarnessModel(models["arm"]), loaded, unsafe_code=True)
    assert (found.value, found.n, found.name) == (1 / 3, 3, "code")


def test_likelihoods_by_a_policy(models: Any) -> None:
    lm, policy = models["llada"], Policy("confidence", 2)
    model = HarnessModel(lm, policy=policy)
    requests = [asked("ab", " cd"), asked("abc", "defgh")]
    pairs = [
        (lm.encode(context), lm.encode_after(context, text)) for context, text in [("ab", " cd"), ("abc", "defgh")]
    ]
    expected = [score.mean for score in log_likelihood(lm, pairs, policy=policy)]
    assert [value for value, _ in model.loglikelihood(requests)] == pytest.approx(expected, abs=1e-4)
    [rolling] = model.loglikelihood_rolling([asked("abcdefgh")])
    [whole] = log_likelihood(lm, [([], lm.encode("abcdefgh"))], policy=policy)
    assert rolling == pytest.approx(whole.mean, abs=1e-4)
    with pytest.raises(UserError, match=r"policy confidence@2: arm has no \[MASK\]"):
        HarnessModel(models["arm"], policy=policy)
