"""Speed and memory, side by side with a peer in one run. Not a test: timings depend on the machine, ratios less so.

    python bench.py                     all that this machine can run
    python bench.py step replay         these sections only

Sections (every figure is a median over repetitions, with the spread, and stands beside its peer's):
    step      a training step of the embedded model against TRL's GRPOTrainer (pip install trl==1.16.0)
    memory    one update at a vocabulary of 151,936 against full logits
    packing   answers of very different lengths, packed against padded
    engines   the transformers engine against bare generate
    replay    the samplers at a million prompts, per draw and observe
Each contender runs in a process of its own, in turn, so that peaks of memory and warm-up do not mix.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
REPETITIONS = 3


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def per_step(marks: list[tuple[float, float]], skip: int = 4) -> dict[str, float]:
    """CPU and wall seconds a step from (wall, CPU) readings at the end of each; the first few are warm-up."""
    wall, cpu = ([b[i] - a[i] for a, b in zip(marks[skip:], marks[skip + 1 :], strict=False)] for i in (0, 1))
    return {"cpu_s": statistics.mean(cpu), "wall_s": statistics.median(wall), "peak_mb": peak_mb()}


def contender(name: str) -> dict[str, float]:
    """Runs `contender_NAME` in a fresh process and returns the figures that it prints."""
    done = subprocess.run([sys.executable, __file__, "--contender", name], capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(section: str, names: tuple[str, str], figures: tuple[str, ...]) -> None:
    """Both contenders in turn, several times; ours first."""
    results = {name: [] for name in names}
    for _ in range(REPETITIONS):
        for name, rows in results.items():
            rows.append(contender(f"{section}_{name}"))
    for figure in figures:
        ours, peer = ([row[figure] for row in results[name]] for name in names)
        ratio = statistics.median(ours) / statistics.median(peer)
        print(f"  {figure:17} {names[0]} {spread(ours):30} {names[1]} {spread(peer):30} ratio {ratio:.2f}")


# ---------------------------------------------------------------- step


def contender_step_ours() -> dict[str, float]:
    import tempfile

    import log
    import train

    marks = []
    lap = log.line

    def note(row):  # called once at the end of each step
        marks.append((time.perf_counter(), time.process_time()))
        return lap(row)

    log.line = note
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--out", f"{folder}/run", "--steps", "30", "--eval-every", "0", "--save-every", "1000"])
    return per_step(marks)


def contender_step_trl() -> dict[str, float]:
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import data
    import reward
    import rollout
    import tiny

    torch.set_num_threads(1)
    model, tokenizer, _ = rollout.load_model(str(tiny.make(HERE / "out" / "tiny-model")))
    marks = []

    class Note(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append((time.perf_counter(), time.process_time()))

    def score(completions, answer, **_):
        return reward.grade_equation(completions, answer)

    pairs = data.arithmetic(2400)[400:]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, max_steps=30, per_device_train_batch_size=128, num_generations=8,
            max_completion_length=15, learning_rate=5e-4,
            lr_scheduler_type="constant", beta=0.0, bf16=False, gradient_checkpointing=False,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=score, args=arguments, processing_class=tokenizer, callbacks=[Note()],
            train_dataset=Dataset.from_list([{"prompt": q, "answer": a} for q, a in pairs]),
        )  # fmt: skip
        trainer.train()
    return per_step(marks)


def section_step() -> None:
    print("a step of 16 prompts x 8 answers x 15 tokens, embedded model, one thread")
    compare("step", ("ours", "trl"), ("cpu_s", "wall_s", "peak_mb"))


# ---------------------------------------------------------------- memory of one update


def watched(work) -> dict[str, float]:
    """Runs `work`; its CPU and wall seconds, and how far memory rose above what it began with."""
    import threading

    def resident() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    base, most, over = resident(), [0.0], threading.Event()

    def watch():
        while not over.wait(0.002):
            most[0] = max(most[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    over.set()
    thread.join()
    return {"over_base_mb": most[0] - base, "wall_s": wall, "cpu_s": cpu}


def large_vocabulary():
    """A model of Qwen3's vocabulary and little else, and four answers of 768 tokens to prompts of 256."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float(), torch.randint(151_936, (4, 1024))


def contender_memory_ours() -> dict[str, float]:
    import torch

    import logprobs

    model, ids = large_vocabulary()

    def work():
        answers = [logprobs.Sequence(tuple(row[:256].tolist()), row[256:], torch.zeros(768), 1.0, 0) for row in ids]
        (micro,) = logprobs.pack(answers, 16_384)
        (-logprobs.model_logprobs(model, micro, 1.0)[0].mean()).backward()

    return watched(work)


def contender_memory_full() -> dict[str, float]:
    import torch

    model, ids = large_vocabulary()

    def work():
        logits = model(input_ids=ids).logits[:, 255:-1].float()
        (-torch.log_softmax(logits, -1).gather(2, ids[:, 256:, None]).mean()).backward()

    return watched(work)


def section_memory() -> None:
    print("one update, vocabulary 151,936, hidden 256, 2 layers, 4 x 1024 tokens, against full logits")
    compare("memory", ("ours", "full"), ("over_base_mb", "wall_s", "cpu_s"))


# ---------------------------------------------------------------- packing


def long_tailed_answers():
    """64 answers with lengths as reasoning models have them: mean 0.3 of the longest."""
    import torch

    import logprobs

    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(64, generator=generator).pow(2.3) * 500).int() + 12
    rows = [torch.randint(50, (int(n),), generator=generator, dtype=torch.int32) for n in lengths]
    return [logprobs.Sequence((1, 2, 3, 4), row, torch.zeros(len(row)), 1.0, 0) for row in rows]


def time_update(padded: bool) -> dict[str, float]:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import logprobs

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=50, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model, answers = Qwen3ForCausalLM(config).float(), long_tailed_answers()

    def work():
        if padded:  # each row an answer, all as wide as the longest of the batch
            width = max(map(len, answers))
            for part in (answers[i : i + 16] for i in range(0, len(answers), 16)):
                ids = torch.zeros(len(part), width, dtype=torch.long)
                for row, s in zip(ids, part, strict=True):
                    row[: len(s)] = torch.cat([torch.tensor(s.prompt), s.tokens])
                logits = model(input_ids=ids).logits[:, 3:-1]
                (-torch.log_softmax(logits, -1).gather(2, ids[:, 4:, None]).mean()).backward()
        else:
            for micro in logprobs.pack(answers, 16 * 512):
                (-logprobs.model_logprobs(model, micro, 1.0)[0].mean()).backward()

    return watched(work)


def contender_packing_ours() -> dict[str, float]:
    return time_update(padded=False)


def contender_packing_padded() -> dict[str, float]:
    return time_update(padded=True)


def section_packing() -> None:
    lengths = [len(s) for s in long_tailed_answers()]
    print(f"an update over answers of {statistics.mean(lengths) / max(lengths):.2f} of the longest on average")
    compare("packing", ("ours", "padded"), ("cpu_s", "wall_s"))


# ---------------------------------------------------------------- engines


def contender_engines_ours() -> dict[str, float]:
    return time_rollouts(bare=False)


def contender_engines_generate() -> dict[str, float]:
    return time_rollouts(bare=True)


def time_rollouts(bare: bool) -> dict[str, float]:
    """Tokens per CPU second of 64 x 16 answers of 48 tokens, end of text ignored, by a random model: no two answers
    are alike, so that nothing is gained by shared prefixes but the prompts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import data
    import rollout

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=1000, hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.05, eos_token_id=999, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float().eval()
    prompts = [data.Prompt(i, "", "", tuple(torch.randint(900, (24,)).tolist())) for i in range(64)]
    engine = rollout.TransformersEngine(model, [1001], 48, batch_size=1024)

    def work():
        if bare:
            ids = torch.tensor([prompt.ids for prompt in prompts])
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, num_return_sequences=16,
                max_new_tokens=48, min_new_tokens=48,
            )  # fmt: skip
        else:
            engine.generate(prompts, 16, seed=0, step=0)

    found = watched(work)
    return {"tokens_per_cpu_s": 64 * 16 * 48 / found["cpu_s"]}


def section_engines() -> None:
    print("the transformers engine, with log-probs, against bare model.generate without")
    compare("engines", ("ours", "generate"), ("tokens_per_cpu_s",))


# ---------------------------------------------------------------- replay


def section_replay() -> None:
    import numpy as np

    from replay import GRESO, Prioritized, PromptReplay, Uniform

    print("a draw and an observe of 32 among 1,000,000 prompts, all of them seen, milliseconds")
    size, rng = 1_000_000, np.random.default_rng(0)
    for kind in (Uniform, PromptReplay, Prioritized, GRESO):
        sampler = kind(size, seed=0)
        sampler.observe(np.arange(size), rng.integers(0, 17, size), np.full(size, 16), 0)
        draws, observes = [], []
        for step in range(1, 41):
            start = time.perf_counter()
            drawn = sampler.draw(32, step)
            middle = time.perf_counter()
            sampler.observe(drawn, rng.integers(0, 17, 32).tolist(), [16] * 32, step)
            draws.append(1e3 * (middle - start))
            observes.append(1e3 * (time.perf_counter() - middle))
        print(f"  {kind.__name__:13} draw {spread(draws):32} observe {spread(observes)}")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--contender"]:
        print(json.dumps(globals()[f"contender_{argv[1]}"]()))
        return
    sections = [name.removeprefix("section_") for name in globals() if name.startswith("section_")]
    unknown = set(argv) - set(sections)
    if unknown:
        sys.exit(f"error: no section {', '.join(sorted(unknown))}; choose from {', '.join(sections)}")
    for name in argv or sections:
        globals()[f"section_{name}"]()


if __name__ == "__main__":
    main(sys.argv[1:])
