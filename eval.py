"""Accuracy on benchmarks with honest error bars, and what the difference between two models is worth.

    python eval.py                                               embedded model, its 400 held-out problems, on a CPU
    python eval.py --model Qwen/Qwen3-8B                         the six benchmarks of the Prompt Replay paper
    python eval.py --model PATH --benchmarks aime24 mine.jsonl   some of them, or files with problem and answer
    python eval.py --compare A/results.json B/results.json       paired differences

A table goes to the console, every score to results.json, every completion to NAME@K.jsonl in --out. The same command
again goes on where it was stopped, and grades anew what is there. results.json holds a sha256 of problems and golds
(benchmarks.py): accuracies on different ones are not compared.

An answer is right if its reward is 1. avg@k is the mean over problems of the share of k answers that are right; the
errors are clustered by problem (stats.py). pass@k is unbiased; pass@1 is avg@k. In the vote (maj@k) ties are shared, no
answer is no vote, and wrong answers are the same if spelt the same. The macro mean counts each benchmark once. AES:
share of tokens saved + 3 x relative gain in accuracy, or - 5 x relative loss, against --baseline.

Sampling is at a temperature alone (the engines have no top-p and no top-k), with one random stream for each (seed,
problem, sample). Answers end after --max-tokens; "cut off" is the share that did.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm

import reward
import rollout
from support import logprobs, stats
from support.config import EMBEDDED, OUT, Config, fail
from tasks import data, tiny
from tasks.benchmarks import BENCHMARKS, Problem, load, score

PASS_AT = (1, 4, 8, 16, 32)

# ---------------------------------------------------------------- answers


def answer(engine, prompts, tokenizer, samples: int, seed: int, temperature: float | None = None) -> list[dict]:
    """`samples` answers to each prompt, one row each. The noise of an answer depends on the seed, the problem and the
    sample alone, so that two evaluations differ by the policy and not by luck."""
    rows = []
    for group in engine.generate(prompts, samples, seed, step=-1, temperature=temperature):
        for i, (tokens, truncated) in enumerate(zip(group.tokens, group.truncated, strict=True)):
            row = {"problem": group.prompt, "sample": i, "tokens": len(tokens), "truncated": bool(truncated)}
            rows.append(row | {"response": tokenizer.decode(tokens, skip_special_tokens=True)})
    return rows


def accuracy(
    engine, prompts: list[data.Prompt], tokenizer, reward: Callable, samples: int, seed: int,
    temperature: float | None = None,
) -> float:  # fmt: skip
    """Mean reward of `samples` answers to each prompt: the held-out accuracy that training logs."""
    rows = answer(engine, prompts, tokenizer, samples, seed, temperature)
    problems = {prompt.index: Problem(prompt.text, (prompt.answer,)) for prompt in prompts}
    rewards = score([row["response"] for row in rows], [problems[row["problem"]] for row in rows], reward)
    return fmean(rewards) if rewards else 0.0


@dataclass
class Task:
    """A benchmark, ready to run."""

    name: str
    problems: list[Problem]
    source: dict  # what it was loaded from
    samples: int  # K, answers to each problem
    reward: str
    prompts: list[data.Prompt]
    done: dict[int, list[dict]]  # the answers that there are, by problem


def finished(path: Path, task: Task) -> dict[int, list[dict]]:
    """The answers in `path` to problems that have all theirs. ValueError if it is about other problems."""
    found: dict[int, dict[int, dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line, left by a killed process: its problem is not complete
        found.setdefault(row["problem"], {})[row["sample"]] = row
    ids = dict(enumerate(problem.id for problem in task.problems))
    strange = {i for i, rows in found.items() if any(row["id"] != ids.get(i) for row in rows.values())}
    if strange:
        raise ValueError(f"{path} answers {len(strange)} problems that {task.name} now lacks; give another --out")
    return {i: [rows[k] for k in range(task.samples)] for i, rows in found.items() if len(rows) == task.samples}


def complete(path: Path, task: Task, engine, tokenizer, seed: int, batch: int) -> None:
    """Generates what is missing, and appends it to `path` and `task.done`, about `batch` answers at a time."""
    write_rows(path, task)
    left = [prompt for prompt in task.prompts if prompt.index not in task.done]
    at_once = max(batch // task.samples, 1)
    bar = tqdm(total=len(task.prompts), initial=len(task.done), desc=task.name, unit="problem", disable=None)
    with bar, open(path, "a", encoding="utf-8") as file:
        for start in range(0, len(left), at_once):
            rows = answer(engine, left[start : start + at_once], tokenizer, task.samples, seed)
            for row in rows:
                row["id"] = task.problems[row["problem"]].id
                task.done.setdefault(row["problem"], []).append(row)
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            bar.update(len(rows) // task.samples)


def write_rows(path: Path, task: Task) -> None:
    aside = path.with_name(path.name + ".partial")  # renamed when whole
    rows = [row for i in sorted(task.done) for row in task.done[i]]
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    aside.replace(path)


# ---------------------------------------------------------------- results


def grade(task: Task) -> None:
    """Sets the score of every answer."""
    rows = [row for rows in task.done.values() for row in rows]
    function = reward.load(task.reward)
    with tqdm(total=len(rows), desc=f"grading {task.name}", unit="answer", disable=None) as bar:
        for part in (rows[start : start + 256] for start in range(0, len(rows), 256)):
            scores = score([r["response"] for r in part], [task.problems[r["problem"]] for r in part], function)
            for row, value in zip(part, scores, strict=True):
                row["score"] = value
            bar.update(len(part))


def summarise(task: Task, pass_at: list[int]) -> dict:
    """What results.json says of a benchmark."""
    final = {"equation": lambda text: text.rpartition("=")[2]}.get(task.reward, lambda text: reward.boxed(text) or "")
    groups = [task.done[i] for i in range(len(task.problems))]
    right = [[row["score"] >= 1 for row in group] for group in groups]
    votes = [
        stats.vote(r, ["".join(final(row["response"]).split()) for row in g])
        for r, g in zip(right, groups, strict=True)
    ]
    runs = [fmean(sample) for sample in zip(*right, strict=True)]
    ids = [problem.id for problem in task.problems]
    return {
        "source": task.source,
        "fingerprint": hashlib.sha256(" ".join(ids).encode()).hexdigest(),
        "samples": task.samples,
        "reward": task.reward,
        "avg": stats.over_problems([fmean(r) for r in right]),
        # how much avg@k would vary with the seed: less than its error, which is about other problems too
        "seed_sd": stdev(runs) / math.sqrt(len(runs)) if len(runs) > 1 else None,
        "pass": {str(k): stats.over_problems([stats.pass_at(k, len(r), sum(r)) for r in right]) for k in pass_at},
        "majority": stats.over_problems(votes),
        "tokens": fmean(row["tokens"] for group in groups for row in group),
        "truncated": fmean(row["truncated"] for group in groups for row in group),
        "ids": ids,
        "scores": [[int(r) for r in group] for group in right],
    }


def run(args, folder: Path, tasks: list[Task], engine, tokenizer, settings: dict, baseline: dict | None) -> dict:
    """Generates, grades and sums up; writes completions and results into `folder`."""
    results = {"settings": settings, "benchmarks": {}}
    for task in tasks:
        path = completions(folder, task)
        complete(path, task, engine, tokenizer, args.seed, args.batch)
        grade(task)
        write_rows(path, task)
        results["benchmarks"][task.name] = summarise(task, args.pass_at or [k for k in PASS_AT if k <= task.samples])
    results["macro"] = stats.macro(list(results["benchmarks"].values()))
    if baseline:
        stats.add_aes(results, baseline)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


# ---------------------------------------------------------------- the program


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error, add = fail, parser.add_argument
    add("--model", default="", help="Hugging Face id or folder; without it the embedded model")
    add("--benchmarks", nargs="+", metavar="NAME", help="names, NAME=FILE or data files (all six; or embedded)")
    add("--samples", nargs="+", default=[], metavar="K", help="answers: K or NAME=K (AIME and AMC 32, others 4)")
    add("--pass-at", nargs="+", type=int, metavar="K", help="(1 4 8 16 32, as far as there are answers)")
    add("--temperature", type=float, help="0: greedy (0.6; embedded: 1)")
    add("--max-tokens", type=int, help=f"of an answer ({Config.max_tokens}; embedded: {EMBEDDED['max_tokens']})")
    add("--thinking", action=argparse.BooleanOptionalAction, help="enable_thinking of the template (its default)")
    add("--seed", type=int, default=0, help="of sampling (0)")
    add("--engine", default="auto", choices=("auto", "vllm", "transformers"), help="what generates (auto)")
    add("--gpu-memory", type=float, default=0.9, help="vLLM: its share of the GPU (0.9)")
    add("--kv-cache-gb", type=float, default=0.0, help="vLLM: fixed size of the KV cache (what its share leaves)")
    add("--batch", type=int, default=512, help="answers generated between two saves (512)")
    add("--reward", default="", help="as for train.py (math; embedded: equation)")
    add("--problem-column", help="of data files; found by itself if it has a usual name")
    add("--answer-column", help="of data files; found by itself if it has a usual name")
    add("--revision", nargs="+", default=[], metavar="NAME=HASH", help="of a benchmark, if not the pinned one")
    add("--out", default="", help="folder of results and completions (one for these settings under out/)")
    add("--baseline", metavar="JSON", help="results.json to compute AES against")
    add("--compare", nargs=2, metavar="JSON", help="what differs between two results.json, and is it luck?")
    return parser.parse_args(argv)


def by_name(values: list[str], flag: str, names) -> dict[str, str]:
    """{"aime24": "8", "": "4"} of ["aime24=8", "4"]."""
    pairs = dict(value.rpartition("=")[::2] for value in values)
    if unknown := set(pairs) - set(names):
        raise ValueError(f"{flag}: no {min(unknown)!r} here; there is {', '.join(filter(None, names))}")
    return pairs


def choose_tasks(args) -> list[Task]:
    """The benchmarks asked for, still without prompts."""
    revisions = by_name(args.revision, "--revision", BENCHMARKS)
    loaded = [load(name, revisions, (args.problem_column, args.answer_column)) for name in args.benchmarks]
    names = [name for name, _, _ in loaded]
    if len(set(names)) < len(names):
        raise ValueError(f"two benchmarks are called {Counter(names).most_common(1)[0][0]!r}; rename a file")
    counts, tasks = by_name(args.samples, "--samples", ["", *names]), []
    for name, problems, source in loaded:
        usual = 1 if args.temperature == 0 else BENCHMARKS[name].samples if name in BENCHMARKS else 4
        count = counts.get(name, counts.get("", str(usual)))
        if not re.fullmatch("[1-9][0-9]*", count) or (args.temperature == 0 and count != "1"):
            raise ValueError(f"--samples {count}: give a whole number from 1, and 1 at temperature 0: all are the same")
        if args.pass_at and not 1 <= min(args.pass_at) <= max(args.pass_at) <= int(count):
            raise ValueError(
                f"--pass-at {max(args.pass_at)}: pass@k needs k answers to a problem or more, and {name} has {count}; "
                "raise --samples or lower --pass-at"
            )
        kind = args.reward or ("equation" if name == "embedded" else "math")
        reward.load(kind)
        tasks.append(Task(name, problems, source, int(count), kind, [], {}))
    return tasks


def prepare(args):
    """All that `run` needs. What can go wrong by a user's mistake goes wrong here, as a ValueError or OSError."""
    args.benchmarks = args.benchmarks or (list(BENCHMARKS) if args.model else ["embedded"])
    small = args.benchmarks == ["embedded"]
    args.temperature = (1.0 if small else 0.6) if args.temperature is None else args.temperature
    usual = EMBEDDED["max_tokens"] if small else Config.max_tokens
    args.max_tokens = usual if args.max_tokens is None else args.max_tokens
    if args.temperature < 0 or args.max_tokens < 1 or args.batch < 1:
        raise ValueError("--temperature must be at least 0, --max-tokens and --batch at least 1")
    tasks = choose_tasks(args)
    baseline = stats.read(args.baseline) if args.baseline else None
    if baseline:
        stats.common({task.name: [problem.id for problem in task.problems] for task in tasks}, stats.ids(baseline))
    if small:
        torch.set_num_threads(EMBEDDED["threads"])
    path = args.model or str(tiny.make(tiny.home()))
    on_vllm = find_spec("vllm") and (args.engine == "vllm" or (args.engine == "auto" and torch.cuda.is_available()))
    model, tokenizer, stop_ids = logprobs.load_model(path, device="cpu" if on_vllm else None)  # vLLM wants the room
    if not tokenizer.chat_template and not small:
        print(data.PLAIN_TEXT, file=sys.stderr)
    for task in tasks:
        pairs = [(problem.text, problem.golds[0]) for problem in task.problems]
        task.prompts, _ = data.encode(pairs, tokenizer, sys.maxsize, args.thinking)
        if not all(prompt.ids for prompt in task.prompts):
            raise ValueError(f"{path} knows no sign of a problem of {task.name}; give another --model")
    settings = {"model": args.model or "embedded", "weights": fingerprint(model)}
    settings |= {key: getattr(args, key) for key in ("temperature", "max_tokens", "thinking", "seed")}
    cfg = Config(
        model=path, engine=args.engine, max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed,
        rollout_batch=args.batch, max_prompt_tokens=max(len(p.ids) for task in tasks for p in task.prompts),
        dtype=EMBEDDED["dtype"] if small else Config.dtype, gpu_memory=args.gpu_memory, kv_cache_gb=args.kv_cache_gb,
    )  # fmt: skip
    model = None if on_vllm else model  # it loads its own
    engine = rollout.make_engine(args.engine, model, path, stop_ids, cfg)
    settings |= {"engine": engine.name, "dtype": cfg.dtype}
    folder = choose_folder(args.out, settings)
    for task in tasks:
        task.done = finished(completions(folder, task), task)
    return folder, tasks, engine, tokenizer, settings, baseline


def completions(folder: Path, task: Task) -> Path:
    return folder / f"{task.name}@{task.samples}.jsonl"


def fingerprint(model) -> str:
    """Of some weights of each tensor: after more training the same folder holds another model."""
    digest = hashlib.sha256()
    for name, weights in model.state_dict().items():
        some = weights.flatten()[:: max(weights.numel() // 256, 1)]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def choose_folder(out: str, settings: dict) -> Path:
    """--out, or a folder under out/ for these settings. ValueError if it has completions made with others."""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]
    folder = Path(out or OUT / f"eval-{Path(settings['model']).name}-{digest}")
    file = folder / "settings.json"
    if file.exists() and (before := json.loads(file.read_text())) != settings:
        changed = [f"{key} {before.get(key)}, not {new}" for key, new in settings.items() if before.get(key) != new]
        raise ValueError(f"{folder} has completions with {'; '.join(changed)}; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    try:
        if args.compare:
            print(stats.compare(*map(stats.read, args.compare), args.compare))
            return 0
        folder, *rest = prepare(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        results = run(args, folder, *rest)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with --out {folder}", file=sys.stderr)
        return 130
    except reward.VerifierBroken as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(stats.table(results))
    print(f"results: {folder / 'results.json'}, completions beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
