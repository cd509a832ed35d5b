"""What lab/bench.py measures: pairs of contenders, ours and a peer, each run in a process of its own.

Update and vLLM are of a size that a GPU is worth: Qwen3-8B's shape with as many layers as leave room for AdamW, and
a random Qwen3 of 0.6 B. On a CPU they run small, so that they are known to work.
"""

import json
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import grpo
from grpo import Answer, Policy

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32

QWEN3_8B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
QWEN3_600M = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SMALL = {
    "vocab_size": 1000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.05,
    "eos_token_id": 999,
    "pad_token_id": 0,
}
# for vLLM on a CPU: a model whose arithmetic outweighs the engine's Python, as that of any real one does
MEDIUM = SMALL | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# Qwen3's vocabulary and little else
WIDE = {
    "vocab_size": 151_936,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
NARROW = {
    "vocab_size": 50,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}

# generation: prompts, answers to each, tokens of each; and how often it is timed
PROMPTS = 64 if GPU else 32
ANSWERS = 16
TOKENS = 512 if GPU else 48
PROMPT_TOKENS = 24
TURNS = 5 if GPU else 10
STEPS = 12 if GPU else 30  # of training


def be_tiny() -> None:
    """Makes models small and runs short, on the CPU: for `python -m lab.bench gpu --tiny`."""
    global PROMPTS, ANSWERS, TOKENS, TURNS, STEPS, MEDIUM
    PROMPTS, ANSWERS, TOKENS = (4, 4, 16)
    TURNS = 2
    STEPS = 7
    MEDIUM = SMALL
    torch.set_num_threads(1)


def length_of(answer) -> int:
    """Tokens of prompt and answer together."""
    return len(answer.prompt) + len(answer.tokens)


def here() -> str:
    return f"{torch.cuda.get_device_name()}, bf16" if GPU else "this CPU, float32, one thread; vLLM on all"


def make_model(shape: dict, device: str = DEVICE):
    """A random Qwen3 in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(Qwen3Config(**shape)).float().eval()


def write_model(shape: dict, folder: Path) -> None:
    """In `folder`: a random Qwen3 in bf16 with the embedded task's tokenizer, and problems of 150 tokens."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from support import costs
    from tasks import tiny

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    tiny.make_tokenizer().save_pretrained(folder / "model")
    digits = random.Random(0)
    with open(folder / "problems.jsonl", "w") as file:
        for _ in range(128):
            problem = "".join(digits.choices("0123456789", k=costs.PROMPT))
            file.write(json.dumps({"problem": problem, "answer": "1"}) + "\n")


def make_answer(prompt: tuple[int, ...], tokens: torch.Tensor) -> Answer:
    """A fresh answer of advantage 1."""
    return Answer(prompt, tokens, behaviour=torch.zeros(len(tokens)), advantage=1.0, age=0)


# ---------------------------------------------------------------- measuring


def seconds(work, repetitions: int = 1) -> float:
    """Wall seconds of one `work`, which has been run once before; on a CPU the CPU's, as other work may be
    about."""
    clock = time.perf_counter if GPU else time.process_time
    work()
    if GPU:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repetitions):
        work()
    if GPU:
        torch.cuda.synchronize()
    return (clock() - start) / repetitions


def peak_mb() -> float:
    unit = 2**20 if sys.platform == "darwin" else 1024  # bytes, or kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def watched(work) -> dict[str, float]:
    """Runs `work`; its CPU and wall seconds, and how far memory rose above what it began with."""
    base = resident_mb()
    most = base
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, resident_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    wall = time.perf_counter()
    cpu = time.process_time()
    work()
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    over.set()
    thread.join()
    return {"over_base_mb": most - base, "wall_s": wall, "cpu_s": cpu}


# ---------------------------------------------------------------- a training step


class Marks:
    """Wall and CPU clocks, read at the end of each step."""

    WARM_UP = 4  # first steps that do not count

    def __init__(self):
        self.wall = []
        self.cpu = []

    def note(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def figures(self) -> dict[str, float]:
        """CPU and wall seconds of a step."""
        wall = torch.tensor(self.wall[self.WARM_UP :], dtype=torch.float64).diff().tolist()
        cpu = torch.tensor(self.cpu[self.WARM_UP :], dtype=torch.float64).diff().tolist()
        return {"cpu_s": statistics.mean(cpu), "wall_s": statistics.median(wall), "peak_mb": peak_mb()}


def after_each_step(work) -> None:
    """Has train.py call `work` at the end of each step: when it makes the step's line for the console."""
    from support import log

    make_line = log.line

    def line(*args, **settings) -> str:
        work()
        return make_line(*args, **settings)

    log.line = line


def contender_step_ours(*flags: str) -> dict[str, float]:
    import train

    marks = Marks()
    after_each_step(marks.note)
    with tempfile.TemporaryDirectory() as folder:
        usual = ["--out", f"{folder}/run", "--steps", str(STEPS), "--eval-every", "0", "--save-every", "1000"]
        train.main([*usual, *flags])
    return marks.figures()


def contender_step_trl(path: str = "", pairs: list | None = None, **options) -> dict[str, float]:
    """path: of a model, and (problem, answer) `pairs` whose rewards are a matter of chance; by default the embedded
    model and task."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import reward
    from support.model import load_model
    from tasks import tiny

    torch.set_num_threads(1)
    model, tokenizer, _ = load_model(path or str(tiny.make(tiny.home())))
    marks = Marks()

    class Note(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.note()

    def score(completions, answer, **_):
        return (reward.grade_random if path else reward.grade_equation)(completions, answer)

    # the embedded task's own settings: 16 prompts x 8 answers of 15 tokens
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 15,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
    }
    if pairs is None:
        pairs, _ = tiny.problems("digits", tiny.HELD_OUT)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=score,
            args=GRPOConfig(output_dir=folder, **settings | options),
            processing_class=tokenizer,
            callbacks=[Note()],
            train_dataset=Dataset.from_list([{"prompt": question, "answer": gold} for question, gold in pairs]),
        )
        trainer.train()
    return marks.figures()


def contender_colocated_ours() -> dict[str, float]:
    """On a GPU a random Qwen3 of 0.6 B, 16 prompts x 8 answers of 512 tokens; on a CPU the embedded model."""
    if not GPU:
        return contender_step_ours()
    with tempfile.TemporaryDirectory() as folder:
        write_model(QWEN3_600M, Path(folder))
        flags = ["--model", f"{folder}/model", "--data", f"{folder}/problems.jsonl", "--reward", "random"]
        flags += ["--instruction", "none", "--engine", "vllm", "--max-tokens", "512", "--max-prompt-tokens", "256"]
        flags += ["--prompts-per-step", "16", "--answers-per-prompt", "8"]
        return contender_step_ours(*flags)


def contender_colocated_trl() -> dict[str, float]:
    """The same by TRL, in micro-batches of 8 answers."""
    if not GPU:
        return contender_step_trl()
    options = {
        "use_cpu": False,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.45,
        "vllm_max_model_length": 768,
        "max_completion_length": 512,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 16,
        "bf16": True,
        "gradient_checkpointing": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_model(QWEN3_600M, Path(folder))
        lines = Path(folder, "problems.jsonl").read_text().splitlines()
        pairs = [tuple(json.loads(line).values()) for line in lines]
        return contender_step_trl(f"{folder}/model", pairs, **options)


# ---------------------------------------------------------------- memory of one update


def wide_ids() -> torch.Tensor:
    """Four answers of 768 tokens to prompts of 256."""
    torch.manual_seed(1)
    return torch.randint(WIDE["vocab_size"], (4, 1024))


def contender_memory_ours() -> dict[str, float]:
    policy = Policy(make_model(WIDE, "cpu"))
    ids = wide_ids()

    def work() -> None:
        answers = [make_answer(tuple(row[:256].tolist()), row[256:]) for row in ids]
        (micro,) = policy.pack(answers, 16_384)
        logprob, _ = policy(micro, 1.0)
        (-logprob.mean()).backward()

    return watched(work)


def contender_memory_full() -> dict[str, float]:
    model = make_model(WIDE, "cpu")
    ids = wide_ids()

    def work() -> None:
        logits = model(input_ids=ids).logits[:, 255:-1].float()
        logprob = torch.log_softmax(logits, -1).gather(2, ids[:, 256:, None])
        (-logprob.mean()).backward()

    return watched(work)


def contender_memory_trl() -> dict[str, float]:
    """TRL's own loss. Its fused head has a kernel for GPUs; this is the path it takes on a CPU."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tasks import tiny

    model = make_model(WIDE, "cpu")
    ids = wide_ids()
    settings = {
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "gradient_checkpointing": False,
        "beta": 0.0,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 768,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(output_dir=folder, **settings),
            processing_class=tiny.make_tokenizer(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 4),
        )
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": ids[:, :256],
        "prompt_mask": torch.ones(4, 256),
        "completion_ids": ids[:, 256:],
        "completion_mask": torch.ones(4, 768),
        "advantages": torch.ones(4),
        "num_items_in_batch": torch.tensor(4 * 768),
    }
    return watched(lambda: trainer._compute_loss(model, inputs).backward())


# ---------------------------------------------------------------- packing


def long_tailed_answers() -> list[Answer]:
    """64 answers with lengths as reasoning models have them: mean 0.3 of the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(64, generator=generator).pow(2.3) * 500).int() + 12
    answers = []
    for length in lengths.tolist():
        tokens = torch.randint(50, (length,), generator=generator, dtype=torch.int32)
        answers.append(make_answer((1, 2, 3, 4), tokens))
    return answers


def contender_packing_ours() -> dict[str, float]:
    torch.set_num_threads(1)
    policy = Policy(make_model(NARROW, "cpu"))
    answers = long_tailed_answers()

    def work() -> None:
        for micro in policy.pack(answers, 16 * 512):
            logprob, _ = policy(micro, 1.0)
            (-logprob.mean()).backward()

    return watched(work)


def contender_packing_padded() -> dict[str, float]:
    """Each row an answer, all as wide as the longest of all."""
    torch.set_num_threads(1)
    model = make_model(NARROW, "cpu")
    answers = long_tailed_answers()
    width = max(length_of(answer) for answer in answers)

    def work() -> None:
        for start in range(0, len(answers), 16):
            part = answers[start : start + 16]
            ids = torch.zeros(len(part), width, dtype=torch.long)
            for row, answer in zip(ids, part, strict=True):
                row[: length_of(answer)] = torch.cat([torch.tensor(answer.prompt), answer.tokens])
            logits = model(input_ids=ids).logits[:, 3:-1]
            logprob = torch.log_softmax(logits, -1).gather(2, ids[:, 4:, None])
            (-logprob.mean()).backward()

    return watched(work)


# ---------------------------------------------------------------- arithmetic of the update against its peak


def layers_that_fit(shape: dict) -> int:
    """16 bytes a parameter for weights, gradients and AdamW, and a quarter of the GPU for the rest."""
    hidden = shape["hidden_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    layer = hidden * (2 * queries + 2 * keys + 3 * shape["intermediate_size"])
    vocabulary = 2 * 16 * shape["vocab_size"] * hidden
    room = 0.75 * torch.cuda.get_device_properties(0).total_memory - vocabulary
    return max(min(int(room / (16 * layer)), shape["num_hidden_layers"]), 1)


def operations(model, shape: dict, answers: list[Answer]) -> float:
    """The arithmetic that an update of `model` on `answers` needs: what checkpointing does again does not
    count."""
    outside = shape["vocab_size"] * shape["hidden_size"]
    tables = 1 if shape.get("tie_word_embeddings") else 2
    inside = sum(p.numel() for p in model.parameters()) - tables * outside
    queries = shape["num_attention_heads"] * shape["head_dim"]
    in_layers = 6 * inside * sum(length_of(answer) for answer in answers)
    in_head = 6 * outside * sum(len(answer.tokens) for answer in answers)
    squares = sum(length_of(answer) ** 2 for answer in answers)
    in_attention = 6 * shape["num_hidden_layers"] * queries * squares  # causal: half of it
    return in_layers + in_head + in_attention


def contender_update_ours() -> dict[str, float]:
    """TFLOP/s of `grpo.update`, AdamW's step included."""
    from support.model import make_optimizer, use_varlen_attention
    from train import Config

    torch.set_num_threads(1)
    shape = SMALL | {"hidden_size": 512}
    prompt, longest, count = (32, 224, 16)
    cfg = Config(dtype="float32", tokens_per_microbatch=2048, is_cap=0.0)
    if GPU:
        shape = QWEN3_8B | {"num_hidden_layers": layers_that_fit(QWEN3_8B)}
        prompt, longest, count = (256, 3840, 32)
        cfg = Config(dtype="bfloat16", tokens_per_microbatch=16_384, is_cap=0.0)
    model = make_model(shape)
    use_varlen_attention(model, cfg.dtype)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model)
    optimizer = make_optimizer(policy, cfg)

    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(count, generator=generator).mul(0.9).add(0.1) * longest).int().tolist()
    answers = []
    for length in lengths:
        answers.append(make_answer(tuple(range(prompt)), torch.randint(900, (length,), generator=generator).int()))
    taken = seconds(lambda: grpo.update(policy, optimizer, answers, cfg, 1))
    return {"tflops": operations(model, shape, answers) / taken / 1e12}


def contender_update_matmul() -> dict[str, float]:
    torch.set_num_threads(1)
    n = 8192 if GPU else 1024
    a = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    b = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    return {"tflops": 2 * n**3 / seconds(lambda: a @ b, 20) / 1e12}


# ---------------------------------------------------------------- generation


def random_prompts() -> list:
    from tasks.data import Prompt

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(900, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    return [Prompt(i, "", "", tuple(row)) for i, row in enumerate(ids)]


def contender_engines_ours() -> dict[str, float]:
    import rollout

    torch.set_num_threads(1)
    engine = rollout.TransformersEngine(make_model(SMALL), [1001], 48, batch_size=1024)
    prompts = random_prompts()
    taken = seconds(lambda: engine.generate(prompts, ANSWERS, seed=0, step=0))
    return {"tokens_per_s": PROMPTS * ANSWERS * 48 / taken}


def contender_engines_generate() -> dict[str, float]:
    """`model.generate`, without log-probs."""
    torch.set_num_threads(1)
    model = make_model(SMALL)
    ids = torch.tensor([prompt.ids for prompt in random_prompts()], device=DEVICE)
    settings = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": True,
        "top_k": 0,
        "num_return_sequences": ANSWERS,
        "max_new_tokens": 48,
        "min_new_tokens": 48,
    }
    taken = seconds(lambda: model.generate(ids, **settings))
    return {"tokens_per_s": PROMPTS * ANSWERS * 48 / taken}


def on_vllm(work) -> dict:
    """work(engine, model), with a model and its engine, which stays on the GPU."""
    import rollout
    from train import Config

    model = make_model(QWEN3_600M if GPU else MEDIUM)
    options = {"enable_sleep_mode": False, "kv_cache_memory_bytes": 2**29}
    if GPU:
        options["kv_cache_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory // 2
    cfg = Config(
        max_prompt_tokens=PROMPT_TOKENS,
        max_tokens=TOKENS,
        dtype="bfloat16" if GPU else "float32",
        rollout_batch=PROMPTS * ANSWERS,
        vllm=json.dumps(options),
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = rollout.VLLMEngine(model, folder, [], cfg)  # nothing ends an answer but its length
        engine.sync(model)
        found = work(engine, model)
        engine.close()
    return found


def contender_vllm_both() -> dict[str, list[float]]:
    """Tokens a wall second, in turn: the engine as it is used, and `LLM.generate` of the same engine
    without seeds and log-probs."""
    return on_vllm(speeds_of_both)


def speeds_of_both(engine, _) -> dict[str, list[float]]:
    from vllm import SamplingParams

    params = SamplingParams(n=ANSWERS, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    prompts = random_prompts()
    asked = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
    cases = {
        "ours": lambda: engine.generate(prompts, ANSWERS, seed=0, step=0),
        "bare": lambda: engine.llm.generate(asked, params, use_tqdm=False),
    }
    speeds = {name: [] for name in cases}
    for turn in range(TURNS + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if turn > 0:  # the first is warm-up
                speeds[name].append(PROMPTS * ANSWERS * TOKENS / (time.perf_counter() - start))
    return speeds


def contender_sync_ours() -> dict[str, float]:
    """All of a sync, its check included."""
    return on_vllm(lambda engine, model: {"sync_s": seconds(lambda: engine.sync(model), 3)})


def contender_sync_copy() -> dict[str, float]:
    """The least it can take: every weight once from the trainer's precision to the engine's."""
    model = make_model(QWEN3_600M if GPU else MEDIUM)
    theirs = [parameter.detach() for parameter in model.parameters()]
    mine = [torch.empty_like(weights, dtype=DTYPE) for weights in theirs]

    def copy() -> None:
        for target, source in zip(mine, theirs, strict=True):
            target.copy_(source)

    return {"sync_s": seconds(copy, 10)}
