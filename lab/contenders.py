"""What bench.py measures: pairs of contenders, ours and a peer, each run in a process of its own.

Update and vLLM are of a size that a GPU is worth: Qwen3-8B's shape with as many layers as leave room for AdamW, and a
random Qwen3 of 0.6 B. On a CPU they run small, so that they are known to work.
"""

import resource
import tempfile
import threading
import time

import torch

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
QWEN3_8B = {
    "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_600M = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {
    "vocab_size": 1000, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.05, "eos_token_id": 999, "pad_token_id": 0,
}  # fmt: skip
# for vLLM on a CPU: a model whose arithmetic outweighs the engine's Python, as that of any real one does
MEDIUM = SMALL | {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
PROMPTS, ANSWERS, TOKENS = (64, 16, 1024) if GPU else (32, 16, 48)


def make_model(shape: dict):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE):
        return Qwen3ForCausalLM(Qwen3Config(**shape)).float().eval()


def seconds(work, repetitions: int = 1) -> float:
    """Wall seconds of one `work`, which has been run once before; on a CPU the CPU's, as other work may be about."""
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


# ---------------------------------------------------------------- memory of one update


def watched(work) -> dict[str, float]:
    """Runs `work`; its CPU and wall seconds, and how far memory rose above what it began with."""

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
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float(), torch.randint(151_936, (4, 1024))


def contender_memory_ours() -> dict[str, float]:
    from support import logprobs

    model, ids = large_vocabulary()

    def work():
        answers = [logprobs.Sequence(tuple(row[:256].tolist()), row[256:], torch.zeros(768), 1.0, 0) for row in ids]
        (micro,) = logprobs.pack(answers, 16_384)
        (-logprobs.model_logprobs(model, micro, 1.0)[0].mean()).backward()

    return watched(work)


def contender_memory_full() -> dict[str, float]:
    model, ids = large_vocabulary()

    def work():
        logits = model(input_ids=ids).logits[:, 255:-1].float()
        (-torch.log_softmax(logits, -1).gather(2, ids[:, 256:, None]).mean()).backward()

    return watched(work)


def contender_memory_trl() -> dict[str, float]:
    """TRL's own loss. Its fused head has a kernel for GPUs; this is the path it takes on a CPU."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tasks import tiny

    model, ids = large_vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False, beta=0.0,
            per_device_train_batch_size=4, num_generations=4, max_completion_length=768,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, args=arguments, processing_class=tiny.make_tokenizer(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 4),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": ids[:, :256], "prompt_mask": torch.ones(4, 256), "completion_ids": ids[:, 256:],
        "completion_mask": torch.ones(4, 768), "advantages": torch.ones(4), "num_items_in_batch": torch.tensor(4 * 768),
    }  # fmt: skip
    return watched(lambda: trainer._compute_loss(model, inputs).backward())


# ---------------------------------------------------------------- packing


def long_tailed_answers():
    """64 answers with lengths as reasoning models have them: mean 0.3 of the longest."""
    from support import logprobs

    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(64, generator=generator).pow(2.3) * 500).int() + 12
    rows = [torch.randint(50, (int(n),), generator=generator, dtype=torch.int32) for n in lengths]
    return [logprobs.Sequence((1, 2, 3, 4), row, torch.zeros(len(row)), 1.0, 0) for row in rows]


def time_update(padded: bool) -> dict[str, float]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from support import logprobs

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


# ---------------------------------------------------------------- arithmetic of the update against its peak


def layers_that_fit(shape: dict) -> int:
    """16 bytes a parameter for weights, gradients and AdamW, and a quarter of the GPU for the rest."""
    h, kv = shape["hidden_size"], shape["num_key_value_heads"] * shape["head_dim"]
    layer = h * (2 * shape["num_attention_heads"] * shape["head_dim"] + 2 * kv + 3 * shape["intermediate_size"])
    room = 0.75 * torch.cuda.get_device_properties(0).total_memory - 32 * shape["vocab_size"] * h
    return max(min(int(room / (16 * layer)), shape["num_hidden_layers"]), 1)


def contender_update_ours() -> dict[str, float]:
    """TFLOP/s of `grpo.update`, AdamW's step included, by the arithmetic that the model needs: what checkpointing does
    again does not count."""
    import grpo
    from support.config import Config
    from support.logprobs import Sequence, choose_attention

    torch.set_num_threads(1)
    shape = QWEN3_8B | {"num_hidden_layers": layers_that_fit(QWEN3_8B)} if GPU else SMALL | {"hidden_size": 512}
    model = make_model(shape)
    choose_attention(model, "auto")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cfg = Config(dtype="bfloat16" if GPU else "float32", tokens_per_microbatch=16_384 if GPU else 2048, is_cap=0.0)
    optimizer = grpo.make_optimizer(model, cfg)
    prompt, longest, count = (256, 3840, 32) if GPU else (32, 224, 16)
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(count, generator=generator).mul(0.9).add(0.1) * longest).int().tolist()
    answers = [
        Sequence(tuple(range(prompt)), torch.randint(900, (n,), generator=generator).int(), torch.zeros(n), 1.0, 0)
        for n in lengths
    ]
    outside = shape["vocab_size"] * shape["hidden_size"]
    inside = sum(p.numel() for p in model.parameters()) - outside * (1 if shape.get("tie_word_embeddings") else 2)
    queries = shape["num_attention_heads"] * shape["head_dim"]
    operations = 6 * inside * sum(map(len, answers)) + 6 * outside * sum(lengths)
    operations += 6 * shape["num_hidden_layers"] * queries * sum(len(a) ** 2 for a in answers)  # causal: half of it
    taken = seconds(lambda: grpo.update(model, optimizer, answers, cfg, 1))
    return {"tflops": operations / taken / 1e12}


def contender_update_matmul() -> dict[str, float]:
    torch.set_num_threads(1)
    n = 8192 if GPU else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return {"tflops": 2 * n**3 / seconds(lambda: a @ b, 20) / 1e12}


# ---------------------------------------------------------------- generation


def random_prompts() -> list:
    from tasks import data

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(900, (PROMPTS, 24), generator=generator).tolist()
    return [data.Prompt(i, "", "", tuple(row)) for i, row in enumerate(ids)]


def contender_engines_ours() -> dict[str, float]:
    import rollout

    torch.set_num_threads(1)
    engine, prompts = rollout.TransformersEngine(make_model(SMALL), [1001], 48, batch_size=1024), random_prompts()
    return {"tokens_per_s": PROMPTS * 16 * 48 / seconds(lambda: engine.generate(prompts, 16, seed=0, step=0))}


def contender_engines_generate() -> dict[str, float]:
    """`model.generate`, without log-probs."""
    torch.set_num_threads(1)
    model = make_model(SMALL)
    ids = torch.tensor([prompt.ids for prompt in random_prompts()], device=DEVICE)
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": 16, "max_new_tokens": 48, "min_new_tokens": 48}
    work = seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how))
    return {"tokens_per_s": PROMPTS * 16 * 48 / work}


def on_vllm(work) -> dict:
    """work(engine, model), with a model and its engine."""
    import rollout
    from support.config import Config

    model = make_model(QWEN3_600M if GPU else MEDIUM)
    cfg = Config(
        max_prompt_tokens=24, max_tokens=TOKENS, dtype="bfloat16" if GPU else "float32", keep_resident=True,
        rollout_batch=PROMPTS * ANSWERS, kv_cache_gb=0 if GPU else 0.5,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = rollout.VLLMEngine(model, folder, [], cfg)  # nothing ends an answer but its length
        found = work(engine, model)
        engine.close()
    return found


def contender_vllm_both() -> dict[str, list[float]]:
    """Wall seconds, in turn: the engine as it is used, and `LLM.generate` of the same engine without seeds and
    log-probs."""

    def work(engine, _):
        from vllm import SamplingParams

        params = SamplingParams(n=ANSWERS, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        prompts = random_prompts()
        asked = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
        cases = {
            "ours": lambda: engine.generate(prompts, ANSWERS, seed=0, step=0),
            "bare": lambda: engine.llm.generate(asked, params, use_tqdm=False),
        }
        speeds = {name: [] for name in cases}
        for _ in range(11):
            for name, case in cases.items():
                start = time.perf_counter()
                case()
                speeds[name].append(PROMPTS * ANSWERS * TOKENS / (time.perf_counter() - start))
        return {name: values[1:] for name, values in speeds.items()}  # the first is warm-up

    return on_vllm(work)


def contender_sync_ours() -> dict[str, float]:
    """All of a sync, its check included."""
    return on_vllm(lambda engine, model: {"sync_s": seconds(lambda: engine.sync(model), 3)})


def contender_sync_copy() -> dict[str, float]:
    """The least it can take: every weight once from the trainer's precision to the engine's."""
    model = make_model(QWEN3_600M if GPU else MEDIUM)
    pairs = [(torch.empty_like(p, dtype=DTYPE), p.detach()) for p in model.parameters()]
    return {"sync_s": seconds(lambda: [mine.copy_(theirs) for mine, theirs in pairs], 10)}


def here() -> str:
    return f"{torch.cuda.get_device_name()}, bf16" if GPU else "this CPU, float32, one thread; vLLM on all"
