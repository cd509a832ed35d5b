"""Accuracy on benchmarks with honest error bars, and what the difference between two models is worth.

    python eval.py                                               embedded model and problems, on a CPU
    python eval.py --model Qwen/Qwen3-8B                         the six benchmarks of the Prompt Replay paper
    python eval.py --model PATH --benchmarks aime24 mine.jsonl   some of them, or files of problems and answers
    python eval.py --compare A/results.json B/results.json       paired differences

A table goes to the console, every score to results.json, every answer to NAME@K.jsonl in --out. The same command
again goes on where it was stopped, and grades anew what is there. results.json holds a sha256 of problems and golds,
since accuracies on different ones are not compared.

An answer is right if its reward is 1 or more. avg@k is the mean over problems of the share of k answers that are right,
with an error clustered by problem (support/stats.py). pass@k is the chance that one of k answers is right, by the
unbiased estimate; pass@1 is avg@k. maj@k is the vote of k: ties are shared, no answer is no vote, and wrong answers are
the same if spelt the same. The macro mean counts each benchmark once. AES is the share of tokens saved, plus 3 x the
relative gain in accuracy, or minus 5 x the relative loss.

Sampling is at a temperature alone (the engines have no top-p and no top-k), with one random stream for each (seed,
problem, sample). Answers end after --max-tokens; "cut off" is the share that did.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Literal

from support.config import check, exits, parse


@dataclass
class Config:
    # ---- model and problem
    model: str = ""  # Hugging Face id or folder; without it the embedded model
    benchmarks: tuple[str, ...] = ()  # names, NAME=FILE, files, task.py, gym:NAME; default: all six, or embedded
    task: str = ""  # instead of benchmarks: path/to/task.py or gym:NAME, its held-out problems, scored by it
    instruction: str = "auto"  # put behind each problem, as in training: auto, none, or a text
    problem_column: str | None = None  # of data files; found if it has a usual name
    answer_column: str | None = None  # of data files; found if it has a usual name
    revision: tuple[str, ...] = ()  # NAME=HASH of a benchmark, if not the pinned one
    # ---- answer
    samples: tuple[str, ...] = ()  # answers to a problem: K or NAME=K; default: 32 for AIME and AMC, else 4
    temperature: float = 0.6  # 0 is greedy (embedded: 1)
    max_tokens: int = 7168  # of an answer, as in training (embedded: 15)
    thinking: bool = False  # enable_thinking of the chat template; with neither flag the template decides
    seed: int = 0  # of sampling
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM on a GPU that has it
    gpu_memory: float = 0.9  # vLLM: its share of the GPU
    vllm: str = ""  # vLLM: other arguments of its own, as JSON: {"kv_cache_memory_bytes": 21474836480}
    batch: int = 512  # answers generated between two saves
    # ---- result
    reward: str = ""  # as for train.py; without it math (embedded: equation)
    pass_at: tuple[int, ...] = ()  # each k of pass@k; default: 1 4 8 16 32, where there are answers
    out: str = ""  # folder of results and completions; without it one for these settings under out/
    baseline: str = ""  # results.json to compute AES against
    compare: tuple[str, str] | None = None  # two results.json: what differs between them, and is it luck?


# Flags are read before what takes seconds to import: --help and mistakes need not wait for it.
if __name__ == "__main__":
    parse(Config, sys.argv[1:], __doc__)

import torch
from tqdm import tqdm

import reward
from rollout import choose_engine, make_engine
from support import stats
from support.answer_files import answers_so_far, choose_results_folder, weights_digest, write_answers
from support.model import load_model
from tasks import data, gym, own, tiny
from tasks.benchmarks import Problem, load_all, near, samples_of, usual_benchmarks, usual_reward

PASS_AT = (1, 4, 8, 16, 32)
GRADED_AT_ONCE = 256  # answers between two moves of the progress bar


@dataclass
class Task:
    """A benchmark, and the answers to it so far."""

    name: str
    problems: list[Problem]
    source: dict  # what it was loaded from
    samples: int  # K, answers to each problem
    reward: str
    prompts: list[data.Prompt] = field(default_factory=list)
    answers: dict[int, list[dict]] = field(default_factory=dict)  # by problem; a row each

    @property
    def ids(self) -> list[str]:
        return [problem.id for problem in self.problems]

    @property
    def file(self) -> str:
        return f"{self.name}@{self.samples}.jsonl"


# ---------------------------------------------------------------- answers, and are they right?


def sample_answers(engine, task: Task, prompts: list[data.Prompt], tokenizer, seed: int) -> list[dict]:
    """K answers to each of some prompts, one row each.

    The noise of an answer depends on the seed, the problem and the sample alone. So two evaluations differ by the
    policy and not by luck.
    """
    rows = []
    for group in engine.generate(prompts, task.samples, seed, step=-1):
        for i, tokens in enumerate(group.tokens):
            row = {
                "problem": group.prompt,
                "sample": i,
                "tokens": len(tokens),
                "truncated": bool(group.truncated[i]),
                "response": tokenizer.decode(tokens, skip_special_tokens=True),
                "id": task.problems[group.prompt].id,
            }
            rows.append(row)
    return rows


def generate_missing(path: Path, task: Task, engine, tokenizer, seed: int, batch: int) -> None:
    """Generates the answers that are missing, about `batch` at a time, and appends them to `path`."""
    # The file is written anew, without torn lines and without answers to problems that lack some.
    write_answers(path, task.answers)

    # Whole problems at a time, each batch on disk before the next: a kill costs one batch.
    left = [prompt for prompt in task.prompts if prompt.index not in task.answers]
    at_once = max(batch // task.samples, 1)
    done = len(task.answers)
    bar = tqdm(total=len(task.prompts), initial=done, desc=task.name, unit="problem", disable=None)
    with bar, open(path, "a", encoding="utf-8") as file:
        for start in range(0, len(left), at_once):
            rows = sample_answers(engine, task, left[start : start + at_once], tokenizer, seed)
            for row in rows:
                task.answers.setdefault(row["problem"], []).append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update(len(rows) // task.samples)


def score(responses: list[str], problems: list[Problem], grade: Callable) -> list[float]:
    """Best reward of each response over the golds of its problem; 1 if it is within the tolerance."""
    # One call for all pairs of a response and a gold, which `grade` works on side by side.
    pairs = [(i, gold) for i, problem in enumerate(problems) for gold in problem.golds]
    rewards = grade([responses[i] for i, _ in pairs], [gold for _, gold in pairs])

    best = [-math.inf] * len(responses)
    for (i, gold), value in zip(pairs, rewards, strict=True):
        tolerance = problems[i].tolerance
        if tolerance and near(reward.boxed(responses[i]) or "", gold, tolerance):
            value = 1.0
        best[i] = max(best[i], float(value))
    return best


def score_answers(task: Task) -> None:
    """Sets the score of every answer, of those from an earlier run too: the reward may be another."""
    rows = [row for rows in task.answers.values() for row in rows]
    grade = reward.load(task.reward)
    with tqdm(total=len(rows), desc=f"grading {task.name}", unit="answer", disable=None) as bar:
        for start in range(0, len(rows), GRADED_AT_ONCE):
            part = rows[start : start + GRADED_AT_ONCE]
            problems = [task.problems[row["problem"]] for row in part]
            responses = [row["response"] for row in part]
            if isinstance(grade, own.Scorer):  # it may ask for more than the gold
                lengths = [row["tokens"] for row in part]
                scores = grade.of_prompts(responses, problems, lengths, [row["truncated"] for row in part])
            else:
                scores = score(responses, problems, grade)
            for row, value in zip(part, scores, strict=True):
                row["score"] = value
            bar.update(len(part))


# ---------------------------------------------------------------- results


def spelling(response: str, kind: str) -> str:
    """The answer in the response, for the vote: without white space, and "" if there is none."""
    if kind == "equation":
        text = response.rpartition("=")[2]
    elif kind == "gym":
        text = gym.answer_in(response) or ""
    elif own.is_own(kind):
        text = reward.boxed(response) or response.strip().rpartition("\n")[2]  # the last line, where nothing is boxed
    else:
        text = reward.boxed(response) or ""
    return "".join(text.split())


def summarise(task: Task, pass_at: tuple[int, ...]) -> dict:
    """What results.json says of a benchmark."""
    # A list of answers for each problem, in the order of the problems.
    groups = [task.answers[i] for i in range(len(task.problems))]
    right = []
    spellings = []
    for group in groups:
        right.append([row["score"] >= 1 for row in group])
        spellings.append([spelling(row["response"], task.reward) for row in group])
    return {
        "source": task.source,
        "fingerprint": hashlib.sha256(" ".join(task.ids).encode()).hexdigest(),
        "samples": task.samples,
        "reward": task.reward,
        **stats.accuracies(right, spellings, pass_at),
        "tokens": fmean(row["tokens"] for group in groups for row in group),
        "truncated": fmean(row["truncated"] for group in groups for row in group),
        "ids": task.ids,
        "scores": [[int(one) for one in group] for group in right],
    }


def run(cfg: Config, folder: Path, tasks: list[Task], engine, tokenizer, settings, baseline) -> dict:
    """Generates, grades and sums up; writes answers and results into `folder`."""
    benchmarks = {}
    for task in tasks:
        path = folder / task.file
        generate_missing(path, task, engine, tokenizer, cfg.seed, cfg.batch)
        score_answers(task)
        write_answers(path, task.answers)
        pass_at = cfg.pass_at or tuple(k for k in PASS_AT if k <= task.samples)
        benchmarks[task.name] = summarise(task, pass_at)

    macro = stats.macro_mean(list(benchmarks.values()))
    results = {"settings": settings, "benchmarks": benchmarks, "macro": macro}
    if baseline:
        stats.add_aes(results, baseline)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


# ---------------------------------------------------------------- the program


def settled(cfg: Config, given: list[str]) -> Config:
    """`cfg` with the defaults that depend on the benchmarks, where a setting was not `given`. ValueError for one
    that is out of its range."""
    # All six benchmarks for a model, the embedded one for the embedded model, trained or not.
    if cfg.task and cfg.benchmarks:
        raise ValueError("--task is a benchmark of its own; leave out --task or --benchmarks")
    benchmarks = (cfg.task,) if cfg.task else cfg.benchmarks
    sharing = tiny.sharing_of(cfg.model) if cfg.model else tiny.kind_of("".join(benchmarks[:1]))
    benchmarks = benchmarks or usual_benchmarks(sharing)
    # None leaves thinking to the chat template. The embedded task has short answers, and its own temperature.
    usual = {"thinking": None}
    if sharing:
        usual |= {"temperature": 1.0, "max_tokens": tiny.SETTINGS["max_tokens"]}
    not_given = {name: value for name, value in usual.items() if name not in given}
    cfg = replace(cfg, benchmarks=benchmarks, **not_given)
    check(cfg)
    return cfg


def choose_tasks(cfg: Config) -> list[Task]:
    """The benchmarks asked for, still without prompts. ValueError if a flag does not fit them."""
    columns = (cfg.problem_column, cfg.answer_column)
    loaded = load_all(cfg.benchmarks, cfg.revision, columns, any_gold=own.is_own(cfg.reward))
    samples = samples_of([name for name, _, _ in loaded], cfg.samples, greedy=cfg.temperature == 0)
    tasks = []
    for name, problems, source in loaded:
        k = samples[name]
        if cfg.pass_at and not 1 <= min(cfg.pass_at) <= max(cfg.pass_at) <= k:
            raise ValueError(
                f"--pass-at {max(cfg.pass_at)}: pass@k needs k answers to a problem or more, and {name} has "
                f"{k}; raise --samples or lower --pass-at"
            )
        kind = cfg.reward or usual_reward(name, source)
        # What is wrong with it should show now, and not after hours of generation.
        grade = reward.load(kind)
        if isinstance(grade, own.Scorer):
            grade.check(problems)
        tasks.append(Task(name, problems, source, k, kind))
    return tasks


def set_up(cfg: Config) -> tuple:
    """What `run` takes behind `cfg`. A user's mistake shows here, as a ValueError or OSError of one line."""
    # What is evaluated, and against what.
    tasks = choose_tasks(cfg)
    baseline = None
    if cfg.baseline:
        baseline = stats.read_results(cfg.baseline)
        stats.shared_benchmarks({task.name: task.ids for task in tasks}, stats.problem_ids(baseline))

    # The model. vLLM loads its own; ours then only says which it is, and leaves the room on the GPU to vLLM.
    embedded = not cfg.model or bool(tiny.sharing_of(cfg.model))
    if embedded:
        torch.set_num_threads(tiny.SETTINGS["threads"])
    path = cfg.model or str(tiny.made(tiny.kind_of(cfg.benchmarks[0])))
    kind, _ = choose_engine(cfg.engine)
    on_vllm = kind == "vllm"
    model, tokenizer, stop_ids = load_model(path, device="cpu" if on_vllm else None)

    # The prompts.
    if not tokenizer.chat_template and not embedded:
        print(data.PLAIN_TEXT, file=sys.stderr)
    longest = 0
    for task in tasks:
        pairs = [(problem.text, problem.golds[0]) for problem in task.problems]
        whole = "task" in task.source and cfg.instruction == "auto"  # rows are whole prompts
        task.prompts, _ = data.encode(pairs, tokenizer, sys.maxsize, cfg.thinking, "none" if whole else cfg.instruction)
        data.check_ids(task.prompts, model.get_input_embeddings().num_embeddings)
        longest = max([longest, *(len(prompt.ids) for prompt in task.prompts)])

    # The engine.
    dtype = tiny.SETTINGS["dtype"] if embedded else "bfloat16"
    knobs = SimpleNamespace(**vars(cfg), rollout_batch=cfg.batch, max_prompt_tokens=longest, dtype=dtype)
    engine = make_engine(cfg.engine, None if on_vllm else model, path, stop_ids, knobs)

    # The folder, and the answers that it has already.
    settings = {"model": cfg.model or "embedded", "weights": weights_digest(model)}
    for name in ("temperature", "max_tokens", "thinking", "seed"):
        settings[name] = getattr(cfg, name)
    settings |= {"engine": engine.name, "dtype": dtype}
    if cfg.instruction != "auto":
        settings["instruction"] = cfg.instruction
    folder = choose_results_folder(cfg.out, settings)
    for task in tasks:
        task.answers = answers_so_far(folder / task.file, task.ids, task.samples)
    return folder, tasks, engine, tokenizer, settings, baseline


def main(argv: list[str]) -> int:
    """Returns the exit code: 2 for a user's mistake, 1 for a broken verifier, 130 if it was interrupted."""
    cfg, given = parse(Config, argv, __doc__)
    with exits(2, ValueError, OSError):
        if cfg.compare:
            first, second = cfg.compare
            print(stats.compare_results(stats.read_results(first), stats.read_results(second), cfg.compare))
            return 0
        cfg = settled(cfg, given)
        folder, *rest = set_up(cfg)
    with exits(1, reward.VerifierBroken), exits(2, reward.RewardBroken, OSError):
        try:
            results = run(cfg, folder, *rest)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on with --out {folder}", file=sys.stderr)
            return 130
        except OSError as error:
            raise OSError(
                f"{folder} cannot be written ({error}); make room, and give the same command again"
            ) from error
    print(stats.results_table(results))
    print(f"results: {folder / 'results.json'}, completions beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
