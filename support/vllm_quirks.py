"""What vLLM needs and does, unexpectedly, where it lives in the trainer's process; each with its reason.

- choose_engine: whether vLLM is the engine of this machine
- vllm_options: the user's own settings for vLLM, from --vllm
- machine_settings: ours that depend on the machine
- share_left: how much of the GPU the trainer leaves to vLLM
- prepare: environment variables, before vLLM is imported
- trainer_untouched: what vLLM changes in this process is put back
- repack_tied_head: a layer that its reload of weights forgets on a CPU
- explain: an error of vLLM in one line
- Peers: ranks that share one engine
"""

import contextlib
import importlib.util
import json
import os
import random

import numpy as np
import torch
import torch.distributed as dist

from support import ranks

GIB = 2**30

# Settings that --vllm may not change, and what decides them.
FIXED = {
    "model": "--model decides it",
    "dtype": "--dtype decides it",
    "max_model_len": "--max-prompt-tokens and --max-tokens decide it",
    "gpu_memory_utilization": "--gpu-memory decides it",
    "logprobs_mode": "training needs the log-probs of the distribution that was sampled from",
    "seed": "every answer has a seed of its own, made from --seed",
    "skip_tokenizer_init": "the engine is given token ids, and gives token ids",
    "distributed_executor_backend": "torchrun starts the ranks",
}

# Settings that this project reads as well: what they must be.
CHECKED = {
    "tensor_parallel_size": int,
    "kv_cache_memory_bytes": int,
    "enable_sleep_mode": bool,
}


def choose_engine(kind: str) -> tuple[str, str]:
    """The name of an engine, and why it is that one. ValueError if it is not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        raise ValueError("vLLM is not installed: pip install -r requirements.txt, or --engine transformers")
    if kind != "auto":
        return kind, "asked for"
    if not torch.cuda.is_available():
        return "transformers", "no CUDA GPU here"
    if not installed:
        return "transformers", "vLLM is not installed"
    return "vllm", "CUDA GPU and vLLM are here"


def vllm_options(cfg) -> dict:
    """The arguments for vllm.LLM that cfg.vllm holds: a JSON object, or "" for none. ValueError, in one
    line, if it is no such object, or sets what it may not."""
    if not cfg.vllm:
        return {}
    example = """--vllm '{"enforce_eager": true, "tensor_parallel_size": 2}'"""
    try:
        options = json.loads(cfg.vllm)
    except json.JSONDecodeError as error:
        raise ValueError(f"--vllm is not JSON ({error}); write for instance {example}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--vllm must be a JSON object, got {cfg.vllm}; write for instance {example}")
    for name, reason in FIXED.items():
        if name in options:
            raise ValueError(f"--vllm cannot set {name}: {reason}; leave it out")
    for name, kind in CHECKED.items():
        if name not in options:
            continue
        value = options[name]
        # By `type`, because true passes for an int elsewhere.
        if type(value) is not kind or (kind is int and value < 1):
            what = "true or false" if kind is bool else "a whole number above 0"
            raise ValueError(f"--vllm: {name} must be {what}, got {json.dumps(value)}")
    return options


def check_options(cfg) -> None:
    """ValueError, in one line, if cfg.vllm cannot be meant, or not with so many ranks."""
    size = vllm_options(cfg).get("tensor_parallel_size", 1)
    if ranks.WORLD % size:
        raise ValueError(
            f"--vllm: tensor_parallel_size {size} needs a multiple of {size} ranks, and there are "
            f"{ranks.WORLD}; start with torchrun --nproc-per-node {size}"
        )


def machine_settings(model, cfg, sleeps: bool) -> dict:
    """The arguments for vllm.LLM that depend on the machine and on what else runs there.

    model: the trainer's, or None. sleeps: whether the engine gives up its memory during the update.
    """
    settings: dict = {"use_tqdm_on_load": False}
    if torch.cuda.is_available():
        # The size of a KV cache that is given is obeyed, whatever the share.
        known = sleeps or "kv_cache_memory_bytes" in vllm_options(cfg)
        settings["gpu_memory_utilization"] = cfg.gpu_memory or share_left(model, known)
    else:
        settings["kv_cache_memory_bytes"] = 2**28
        settings["enforce_eager"] = True  # compiling takes longer than it saves
        settings["enable_chunked_prefill"] = False  # a seeded prompt cannot be split there
    # torchrun has started the ranks, and vLLM shall start none.
    if ranks.WORLD > 1:
        settings["distributed_executor_backend"] = "external_launcher"
    return settings


# Bytes of the GPU that stay free beside the trainer and vLLM. A sync holds one tensor in bf16 and vLLM's new
# copy of its layer, 2.5 GB at the embedding of an 8B model; the rest is for CUDA's libraries and for what
# allocators cannot use.
RESERVE = 4 * GIB


def share_left(model, known: bool) -> float:
    """The share of this GPU that the trainer of `model` leaves to vLLM. None: nobody trains.

    vLLM's share is one of the whole GPU, and what the trainer holds does not count against it. known: whether the
    engine sleeps during the update, or its size is given. ValueError if it does neither, or if nothing is left.
    """
    if model is not None and not known:
        raise ValueError(
            "an engine with enable_sleep_mode false shares the GPU with the update, whose need is not known; "
            "give it a share by --gpu-memory, or kv_cache_memory_bytes"
        )
    # Memory that PyTorch has cached and does not use is free to vLLM once it is given back.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    to_come = 0 if model is None else trainer_to_come(model)
    left = free - to_come - RESERVE
    if left <= 0:
        raise ValueError(
            f"the trainer leaves no room on the GPU: {free / GIB:.1f} GiB are free, of which it will take "
            f"{to_come / GIB:.1f}, and {RESERVE / GIB:.0f} are kept back"
        )
    return left / total


def trainer_to_come(model) -> int:
    """Bytes that the trainer of `model` will yet put on this GPU, and hold while answers are generated.

    The engine starts before the first update has made AdamW's moments, and over several ranks before the weights
    have been sharded. Moments of eight bits are counted as whole ones.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # A working copy: its masters and all moments are on the host.
    if any(getattr(weight, "master_on_host", False) for weight in weights):
        return 0
    count = sum(weight.numel() for weight in weights)
    if ranks.WORLD == 1:
        return 8 * count

    # While weights are sharded, one part after the other is whole: a layer, or all that is in none.
    layers = []
    for part in model.modules():
        if type(part).__name__ in (model._no_split_modules or ()):
            layers.append(sum(weight.numel() for weight in part.parameters()))
    whole = max([count - sum(layers), *layers])
    return max(12 * count // ranks.WORLD, 4 * count // ranks.WORLD + 4 * whole)


def prepare() -> None:
    """Sets the environment variables that vLLM reads when it is imported."""
    # The engine lives in this process: another one would need the weights sent to it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # It would report the hardware and the model to its makers.
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # It prints a page at each start, which hides our own lines. The user may ask for it.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # On a CPU it compiles a helper even if told not to, and fails where there is no C++ compiler.
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


_engine_threads = 0  # CPU threads that vLLM has chosen for itself; 0: it has not run yet


@contextlib.contextmanager
def trainer_untouched():
    """Puts back what vLLM changes in this process while the block runs.

    1. It seeds the global random generators, and draws from them.
    2. On a GPU it sets PyTorch to one CPU thread (vllm#49919), on which an optimiser on the host would crawl. On a
       CPU it replaces `torch.set_num_threads` by a function that does nothing.
    3. On a CPU it sets environment variables that child processes would inherit.
    """
    global _engine_threads
    python = random.getstate()
    numpy = np.random.get_state()
    set_num_threads = torch.set_num_threads
    threads = torch.get_num_threads()
    variables = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []

    # Compiled code is compiled for a number of threads: vLLM gets back the one that it ran with before.
    if _engine_threads:
        set_num_threads(_engine_threads)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        _engine_threads = torch.get_num_threads()
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def repack_tied_head(model) -> None:
    """Renews the packed copy of an output layer that is tied to the embedding. `model` is vLLM's.

    On a CPU vLLM computes with packed copies of the weights. Its reload renews all of them but this one, so that the
    output layer would go on with the old weights. Elsewhere this does nothing.
    """
    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    if hasattr(head, "cpu_linear") and embedding is not None and head.weight is embedding.weight:
        head.quant_method.process_weights_after_loading(head)


def explain(error: Exception) -> str:
    """One line for an error of vLLM, whose own may take pages, and what to do about it."""
    what = " ".join(str(error).split())[:400]
    return (
        f"{what} ({type(error).__name__}); if memory is short, change --gpu-memory, or kv_cache_memory_bytes "
        "in --vllm; else use --engine transformers"
    )


class Peers:
    """The ranks that share one engine: neighbours, as many as its tensor_parallel_size.

    vLLM wants the same requests from each of them. So each asks for the prompts of all, and keeps the answers to its
    own. Where every rank has an engine to itself, nothing happens here.
    """

    def __init__(self, size: int):
        self.group = None
        if size > 1:
            self.group, _ = dist.new_subgroups(size)

    def collect(self, prompts: list) -> tuple[list, slice]:
        """The prompts of all peers, and where those of this rank stand among them."""
        if self.group is None:
            return prompts, slice(0, len(prompts))
        parts: list[list] = [[] for _ in range(self.group.size())]
        dist.all_gather_object(parts, prompts, self.group)
        first = sum(len(part) for part in parts[: self.group.rank()])
        everyone = [prompt for part in parts for prompt in part]
        return everyone, slice(first, first + len(prompts))
