"""What a run will need, before it is started: `python train.py ... --dry-run`. No GPU, no weights, only config.json.

    python train.py --model Qwen/Qwen3-8B --replay --dry-run                  against the GPUs that are found
    python train.py --model Qwen/Qwen3-8B --replay --dry-run --gpus 8x80      against 8 of 80 GB

The number of parameters is exact: the model is built without storage. Memory is an estimate by the formulas below, for
each GPU, in three phases that do not coincide: at start-up weights arrive, sharded a layer at a time; in rollouts the
engine has bf16 weights of its own and its KV cache, and there are no gradients; in the update the engine sleeps, and
either the end of the forward pass or the backward pass needs most. Dense models, bytes:

    weights 4 P/N    gradients 4 P/N    AdamW 8 P/N, in 8 bits 2.1 P/N    engine 2 P    KV 4 K a token and layer
    bf16 copies that autocast makes of weights: 2 P, kept for the backward pass unless activations are checkpointed;
    sharded: of two layers and of what is outside of layers, and 6 bytes for each of their gradients before sharding
    activations of a layer that its backward pass needs: A = T (26 H + 14 Q + 6 K + 8 I + 2 L), the last being a copy
    of the mask, and half of it for gradients on the way; with checkpointing 4 T H, and A for one layer only
    head: 14 x 2^27 for a chunk of logits, 8 T H, and 6 V H for its gradient before it is added

P parameters, N GPUs, H hidden size, Q = heads x head size, K = KV heads x head size, I size of the MLP, V vocabulary,
T tokens of a micro-batch, L of the longest sequence.
"""

import contextlib
import dataclasses
import os
import re

import torch

GIB = 2**30
USABLE = 0.97  # of a GPU; the rest is the driver's
CONTEXT = 2 * GIB  # CUDA, libraries, what the allocator cannot use
ENGINE, ASLEEP = 3 * GIB, 1 * GIB  # vLLM's activations and CUDA graphs; what it keeps when it sleeps
CHUNK = 2**27  # logits at a time (logprobs.py), in bf16, float32, and twice for the entropy
OTHER = "CUDA, workspaces"


def read(path: str):
    """Config and tokenizer of a model, without weights. ValueError if there is none, in one line."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises half a dozen kinds here, some with pages of text
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no model can be read from {path!r} ({type(error).__name__}: {first}); give a Hugging Face id (gated ones "
            "after `hf auth login`), or without network a folder with config.json and tokenizer"
        ) from error


def shape(config) -> dict[str, int]:
    """Sizes that memory depends on; `layer` and `outside` are parameters of a layer and of all else."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    kinds = model._no_split_modules or ()
    layers = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in kinds]
    total = sum(p.numel() for p in model.parameters())  # tied ones once
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return {
        "parameters": total,
        "layer": max(layers, default=total),
        "outside": total - sum(layers),
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "queries": heads * size,
        "keys": (getattr(text, "num_key_value_heads", None) or heads) * size,
        "mlp": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "vocabulary": text.vocab_size,
        "context": getattr(text, "max_position_embeddings", None) or 0,
    }


def layer_activations(s: dict, tokens: int, longest: int, bfloat16: bool) -> int:
    """Bytes that one layer keeps for its backward pass. Compared with Qwen3 itself in test_plan.py."""
    h, q, k, i = s["hidden"], s["queries"], s["keys"], s["mlp"]
    if bfloat16:  # the residual stream is float32; each projection keeps a bf16 copy of its own of what it read
        return tokens * (26 * h + 14 * q + 6 * k + 8 * i + 2 * longest)
    return tokens * (24 * h + 24 * q + 8 * k + 16 * i + 4 * longest)


def kv_cache(s: dict, cfg, gpu: float) -> dict[str, float]:
    """Bytes a token, in the pool and for all answers of a step at once; and how many whole answers the pool holds."""
    vllm, longest = cfg.engine != "transformers", cfg.max_prompt_tokens + cfg.max_tokens
    size = 2 if cfg.dtype == "bfloat16" else 4
    token = (2 * size if vllm else size + 4) * s["layers"] * s["keys"]  # autocast leaves the keys in float32
    answers = cfg.prompts_per_step * cfg.answers_per_prompt
    if vllm:
        share = cfg.gpu_memory * gpu - (size * s["parameters"] / 1 + ENGINE)
        pool = max(share, 0.0)
    else:
        pool = min(cfg.rollout_batch, answers) * token * longest
    token /= 1
    return {
        "token": token,
        "pool": pool,
        "all": token * (cfg.prompts_per_step * cfg.max_prompt_tokens + answers * cfg.max_tokens),
        "at_once": pool / (token * longest),
    }


def activations(s: dict, cfg, checkpointing: bool, backward: bool = True) -> int:
    """Bytes at the end of a micro-batch's forward pass, or in its backward pass."""
    longest = cfg.max_prompt_tokens + cfg.max_tokens
    tokens = max(cfg.tokens_per_microbatch, longest)
    layer = layer_activations(s, tokens, longest, cfg.dtype == "bfloat16")
    kept = s["layers"] * (4 * tokens * s["hidden"] if checkpointing else layer)
    return kept + (layer * checkpointing + layer // 2) * backward


def update_memory(s: dict, cfg, count: int) -> dict[str, float]:
    """The update's own: weights as they are computed with, activations, head; at the worse of two moments."""
    bfloat16, saved = cfg.dtype == "bfloat16", not cfg.gradient_checkpointing
    few = (2 if bfloat16 else 4 * (count > 1)) * (s["outside"] + 2 * s["layer"])
    every = 2 * s["parameters"] * bfloat16 if count == 1 else few
    tokens = max(cfg.tokens_per_microbatch, cfg.max_prompt_tokens + cfg.max_tokens)
    head = 14 * min(CHUNK, tokens * s["vocabulary"]) + 8 * tokens * s["hidden"]
    gradients = 6 * (s["outside"] + s["layer"]) if count > 1 else 6 * s["vocabulary"] * s["hidden"]
    forward = (every, activations(s, cfg, not saved, backward=False), head, 0)
    backward = (every if saved else few, activations(s, cfg, not saved), head, gradients)
    names = ("weights as computed with", "activations", "head and logits", "gradients on the way")
    return dict(zip(names, max(forward, backward, key=sum), strict=True))


def plan(s: dict, cfg, count: int = 1, gpu: float = 0.0) -> dict:
    """Memory of each of `count` GPUs of `gpu` bytes (0: none known), phase by phase. s: from `shape`; all in bytes."""
    p, vllm = s["parameters"], cfg.engine != "transformers"
    kv, copies = kv_cache(s, cfg, gpu), 1 + (cfg.kl > 0)
    answers = cfg.prompts_per_step * cfg.answers_per_prompt
    kv["all"] /= count
    bfloat16, resident = cfg.dtype == "bfloat16", vllm and False
    engine = (2 if bfloat16 else 4) * p / 1 if vllm else p * (2 * bfloat16 + 4 * (count > 1))
    generating = ENGINE if vllm else 12 * min(cfg.rollout_batch, answers) * s["vocabulary"]  # logits, log-probs, sums
    trainer = {
        "weights, float32": 4 * p * copies / count,
        "optimiser": (2.1 if cfg.optimizer == "adamw8bit" else 8) * p / count,
    }
    pool = {"engine's weights": engine, "KV cache": kv["pool"]}
    loaded = 4 * max(s["outside"], s["layer"]) * (count > 1)  # what is being sharded is whole
    phases = {
        "start-up": {"weights, float32": 4 * p * copies / count + loaded}
        | (pool if vllm else {})
        | {OTHER: CONTEXT + ENGINE * vllm},
        "rollout": trainer | pool | {OTHER: CONTEXT + generating},
        "update": trainer
        | {"gradients": 4 * p / count}
        | update_memory(s, cfg, count)
        | (pool if resident else {})
        | {OTHER: CONTEXT + (ENGINE if resident else ASLEEP * vllm)},
    }
    peaks = {name: sum(parts.values()) for name, parts in phases.items()}
    return {
        "parameters": p,
        "gpus": count,
        "gpu": gpu,
        "phases": phases,
        "peaks": peaks,
        "kv": kv,
        "activations": {on: activations(s, cfg, on) for on in (False, True)},
        "tokens": {"most": answers * cfg.max_tokens, "mean": answers * cfg.max_tokens // 2},
        "fits": None if not gpu else max(peaks.values()) <= USABLE * gpu and kv["at_once"] >= 1,
    }


def changes(s: dict, cfg, count: int, gpu: float) -> list[str] | None:
    """What to change, least first, so that it fits; nothing if it does, None if nothing of this helps."""

    def fits(steps) -> bool:
        settings, n = {}, count
        for _, change, more in steps:
            settings, n = settings | change, more or n
        return plan(s, dataclasses.replace(cfg, **settings), n, gpu)["fits"]

    if fits([]):
        return []
    longest = cfg.max_prompt_tokens + cfg.max_tokens
    steps = [("--optimizer adamw8bit", {"optimizer": "adamw8bit"}, 0)] if cfg.optimizer == "adamw" else []
    if not cfg.gradient_checkpointing:
        steps.append(("--gradient-checkpointing", {"gradient_checkpointing": True}, 0))
    if cfg.tokens_per_microbatch > longest:
        steps.append((f"--tokens-per-microbatch {longest}", {"tokens_per_microbatch": longest}, 0))
    if False:
        steps.append(("no --keep-resident", {"keep_resident": False}, 0))
    small = [gb for gb in (40, 20, 10, 5) if kv_cache(s, cfg, gpu)["token"] * longest <= gb * GIB and gb * GIB < gpu]
    choices = [[], *([(f"--kv-cache-gb {gb}", {"kv_cache_gb": float(gb)}, 0)] for gb in small)]
    if cfg.engine == "transformers":
        choices = [[], [("--rollout-batch 16", {"rollout_batch": 16}, 0)]]
    for n in (0, *(n for n in (2, 4, 8, 16, 32, 64) if n > count)):
        more = [(f"{n} such GPUs: torchrun --nproc-per-node {min(n, 8)}", {}, n)] if n else []
        for choice in choices:
            for k in range(len(steps) + 1):
                found = steps[:k] + choice + more
                if fits(found):
                    for step in steps[:k]:  # the earlier ones may not be needed any more
                        if fits(rest := [other for other in found if other is not step]):
                            found = rest
                    return [text for text, _, _ in found]
    return None


def found_gpus(flag: str = "") -> tuple[int, float]:
    """Number and bytes of the GPUs that `flag` ("8x80") says, or that are here; (1, 0) where there is none."""
    if flag:
        match = re.fullmatch(r"\s*([1-9]\d*)\s*x\s*(\d+(?:\.\d+)?)\s*(?:Gi?B?)?\s*", flag, re.I)
        if not match or not float(match[2]):
            raise ValueError(f"--gpus {flag!r} is no number and size of GPUs; write 8x80 for 8 of 80 GB")
        return int(match[1]), float(match[2]) * GIB
    if not torch.cuda.is_available():
        return 1, 0.0
    count = int(os.environ.get("WORLD_SIZE", 0)) or torch.cuda.device_count()
    return count, float(torch.cuda.get_device_properties(0).total_memory)


def size(number: float) -> str:
    return f"{number / GIB:.1f}" if number >= 0.05 * GIB or not number else f"{number / GIB:.2g}"


def table(found: dict) -> str:
    """The plan for reading."""
    phases, kv, on = found["phases"], found["kv"], found["activations"]
    names = [*phases["update"], *phases["rollout"]]  # the order in which they are shown
    names = [*dict.fromkeys(name for name in names if name != OTHER), OTHER]
    title = f"memory planned on {'the' if found['gpus'] == 1 else 'each'} GPU, in GiB"
    lines = [f"{title:40}" + "".join(f"{phase:>10}" for phase in phases)]
    for name in names:
        cells = "".join(f"{size(parts[name]) if parts.get(name) else '':>10}" for parts in phases.values())
        lines.append(f"  {name:38}{cells}")
    lines.append(f"  {'together':38}" + "".join(f"{size(peak):>10}" for peak in found["peaks"].values()))
    whole = f"{size(kv['all'])} GiB for {'all' if found['gpus'] == 1 else 'its'} answers of a step at full length"
    holds = f"; {size(kv['pool'])} GiB hold {kv['at_once']:,.1f} such answers at once" if kv["pool"] else ""
    lines += [
        f"activations of a micro-batch: {size(on[False])} GiB, with gradient checkpointing {size(on[True])}",
        f"KV cache: {kv['token'] / 1024:,.1f} KiB a token, {whole}{holds}",
    ]
    return "\n".join(lines)


def verdict(s: dict, cfg, found: dict) -> str:
    count, gpu = found["gpus"], found["gpu"]
    if not gpu:
        return "no GPU here to compare with; say which you have: --gpus 8x80"
    have = f"{count} GPU{'s' if count > 1 else ''} of {gpu / GIB:.0f} GB ({USABLE * gpu / GIB:.1f} GiB usable)"
    if found["fits"]:
        start = f"; start it with torchrun --nproc-per-node {min(count, 8)} train.py ..." if count > 1 else ""
        return f"fits {have}: {size(max(found['peaks'].values()))} GiB at most{start}"
    worst = max(found["peaks"], key=found["peaks"].get)
    why = f"{size(found['peaks'][worst])} GiB in the {worst} phase"
    if found["kv"]["at_once"] < 1:
        why = "the KV cache does not hold one whole answer"
    change = changes(s, cfg, count, gpu)
    how = "take larger GPUs or a smaller model" if change is None else "change " + ", ".join(change)
    return f"does not fit {have}: {why}; {how}"


def out_of_memory(cfg, config) -> str:
    """What to tell whose run got out of GPU memory, in one line."""
    s = shape(config)
    found = plan(s, cfg, int(os.environ.get("WORLD_SIZE", 1)), found_gpus()[1])
    line = verdict(s, cfg, found)
    if found["fits"]:
        line = f"by the plan it {line}. Is another process on it? Else lower --tokens-per-microbatch or --gpu-memory"
    return f"out of GPU memory: {line} (the plan: --dry-run)"


class OutOfMemory(ValueError):
    """The GPU's memory is not enough; the message has the plan, and what to change."""


@contextlib.contextmanager
def explained(cfg, path: str):
    """Turns CUDA's error into OutOfMemory. path: of the model."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        config, _ = read(path)
        raise OutOfMemory(out_of_memory(cfg, config)) from error


def report(cfg, given: list[str], config, tokenizer, prompts: list) -> str:
    """All of --dry-run: configuration, first prompt, tokens of a step, memory, verdict. ValueError for a --gpus that
    cannot be read and for answers that the model's context does not hold."""
    s, (count, gpu) = shape(config), found_gpus(cfg.gpus)
    longest = cfg.max_prompt_tokens + cfg.max_tokens
    if s["context"] and longest > s["context"]:
        raise ValueError(
            f"--max-prompt-tokens {cfg.max_prompt_tokens} and --max-tokens {cfg.max_tokens} make {longest} tokens, and "
            f"the model has a context of {s['context']}; lower one of them"
        )
    lines = ["configuration (* given by hand)"]
    for field in dataclasses.fields(cfg):
        lines.append(f" {'*' if field.name in given else ' '} {field.name:24}{getattr(cfg, field.name)!r}")
    if cfg.engine == "auto" and not cfg.model and not gpu:
        cfg = dataclasses.replace(cfg, engine="transformers")  # what the embedded model will run on here
    found, first = plan(s, cfg, count, gpu), prompts[0]
    tokens, answers = found["tokens"], cfg.prompts_per_step * cfg.answers_per_prompt
    lines += [
        f"first of {len(prompts):,} prompts as the model sees it, {len(first.ids)} tokens; answer: {first.answer}",
        *(f"  | {line}" for line in tokenizer.decode(first.ids).split("\n")),
        f"one step: {cfg.prompts_per_step} prompts x {cfg.answers_per_prompt} answers = {answers:,} answers, at most "
        f"{tokens['most']:,} tokens; {tokens['mean']:,} if answers are half of --max-tokens on average",
        f"model: {s['parameters']:,} parameters in {s['layers']} layers, context {s['context']:,}",
        table(found),
        verdict(s, cfg, found),
    ]
    return "\n".join(lines)
