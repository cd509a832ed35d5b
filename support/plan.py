"""What a run will need, before it is started: `python train.py ... --dry-run`. No GPU, no weights, only config.json.

    python train.py --model Qwen/Qwen3-8B --replay --dry-run                  against the GPUs that are found
    python train.py --model Qwen/Qwen3-8B --replay --dry-run --gpus 8x80      against 8 of 80 GB

The number of parameters is exact: the model is built without storage. Memory is an estimate by the formulas below,
for each GPU, in three phases that do not coincide: at start-up weights arrive, sharded a layer at a time; in
rollouts the engine has bf16 weights of its own and its KV cache, and there are no gradients; in the update the
engine sleeps, and one of three moments needs most. Dense models, bytes:

    weights 4 P/N    gradients 4 P/N    AdamW 8 P/N, in 8 bits 2.1 P/N    engine 2 P    KV 4 K a token and layer
    masters on the host: there 12 P, 12.9 P at its peak; on the GPU weights 2 U + 4 (P - U), gradients 4 P
    else on the host, while the model is loaded: 4.9 P of the first rank; and of each 4 P for each whole copy that a
    reference model or the transformers engine is made from
    kept of a layer until its backward pass: A = T (26 H + 14 Q + 6 K + 8 I); with checkpointing 4 T H
    end of the forward pass: 8 x 2^27 for a chunk of logits, 18 T H
    head's backward pass:    6 x 2^27 for a chunk of logits, 12 T H, and 6 V H for its gradient before it is added
    a layer's backward pass: A if checkpointed, and T (2 I + 4 H) for gradients on the way
    bf16 copies of weights that autocast makes: 2 U at the end of the forward pass, kept for the backward pass unless
    activations are checkpointed: then those of the head, or of the layer
    sharded: copies of two layers and of what is outside of layers; 6 bytes for each gradient of a layer, and 2 for
    each of the head's, before they are sharded

P parameters, U of them in linear layers that share no weight with an embedding, N GPUs, H hidden size, Q = heads x
head size, K = KV heads x head size, I size of the MLP, V vocabulary, T tokens of a micro-batch. In float32 attention
has a mask, of which a layer keeps a copy. tests/test_plan.py has a trace of Qwen3-8B's update beside these formulas.
"""

import contextlib
import dataclasses
import json
import os
import re
import resource
from pathlib import Path

import torch

from support import costs
from support.vllm_quirks import GIB, RESERVE, choose_engine, vllm_options

USABLE = 0.97  # of a GPU; the rest is the driver's
CONTEXT = 2 * GIB  # CUDA, libraries, what the allocator cannot use
ENGINE = 3 * GIB  # vLLM's activations and CUDA graphs
ASLEEP = 1 * GIB  # what vLLM keeps when it sleeps
CHUNK = 2**27  # logits at a time (logprobs.py), in bf16, float32, and twice for the entropy
HOST = 12.9  # bytes a parameter in host memory at its peak, with float32 masters there: 12, and what load and save take
LOAD = 4.9  # the same without masters: weights pass through it in float32, of several ranks those of the first
CLOSE = 0.03  # of what is usable: a plan that has not been measured may be off by so much
OTHER = "CUDA, workspaces"

# ---------------------------------------------------------------- the model


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
    """Sizes that memory depends on; `layer` and `outside` are parameters of a layer and of all else,
    `linear` those of linear layers that share no weight with an embedding."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())  # tied ones once

    # a layer is what FSDP2 shards as one
    kinds = model._no_split_modules or ()
    layers = []
    embeddings = []
    linear = 0
    for module in model.modules():
        if type(module).__name__ in kinds:
            layers.append(sum(p.numel() for p in module.parameters()))
        if isinstance(module, torch.nn.Embedding):
            embeddings.append(module.weight)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not any(module.weight is weight for weight in embeddings):
            linear += sum(p.numel() for p in module.parameters())

    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return {
        "parameters": total,
        "layer": max(layers, default=total),
        "outside": total - sum(layers),
        "linear": linear,
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "queries": heads * size,
        "keys": (getattr(text, "num_key_value_heads", None) or heads) * size,
        "mlp": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "vocabulary": text.vocab_size,
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "context": getattr(text, "max_position_embeddings", None) or 0,
    }


# ---------------------------------------------------------------- formulas


def longest(cfg) -> int:
    return cfg.max_prompt_tokens + cfg.max_tokens


def microbatch(cfg) -> int:
    """Its tokens: one sequence is never divided."""
    return max(cfg.tokens_per_microbatch, longest(cfg))


def has_bfloat16(cfg) -> bool:
    return cfg.dtype == "bfloat16"


def layer_activations(s: dict, tokens: int, width: int, bfloat16: bool) -> int:
    """Bytes that one layer keeps for its backward pass. width: of the mask, 0 where attention has none."""
    h = s["hidden"]
    q = s["queries"]
    k = s["keys"]
    i = s["mlp"]
    # the residual stream is float32; in bf16 each projection keeps a copy of its own of what it read
    if bfloat16:
        return tokens * (26 * h + 14 * q + 6 * k + 8 * i + 2 * width)
    return tokens * (24 * h + 24 * q + 8 * k + 16 * i + 4 * width)


def activations(s: dict, cfg) -> tuple[int, int]:
    """Bytes that a micro-batch keeps of all layers until the backward pass, and those of one layer."""
    tokens = microbatch(cfg)
    # In bf16 attention knows the borders of sequences without a mask (support/attention.py).
    width = 0 if has_bfloat16(cfg) else longest(cfg)
    layer = layer_activations(s, tokens, width, has_bfloat16(cfg))
    kept = 4 * tokens * s["hidden"] if cfg.gradient_checkpointing else layer
    return s["layers"] * kept, layer


def weight_copies(s: dict, cfg, place: str) -> tuple[int, int, int]:
    """Bytes of the copies of weights that are computed with: at the end of the forward pass, in the head's
    backward pass, and in a layer's."""
    if place == "sharded":
        size = 2 if has_bfloat16(cfg) else 4
        return (size * (s["outside"] + 2 * s["layer"]),) * 3
    if place == "host" or not has_bfloat16(cfg):  # the weights themselves, but for a head that is an embedding, too
        head = 0
        if has_bfloat16(cfg) and s["tied"]:
            head = 2 * s["vocabulary"] * s["hidden"]
        return head, head, 0
    head = 2 * s["vocabulary"] * s["hidden"]
    every = 2 * s["linear"]
    if s["tied"]:
        every += head
    if cfg.gradient_checkpointing:
        return every, head, 2 * s["layer"]
    return every, every, every


def update_memory(s: dict, cfg, place: str) -> dict[str, float]:
    """The update's own: copies of weights, activations, head; at the worst of three moments."""
    tokens = microbatch(cfg)
    kept, layer = activations(s, cfg)
    copies = weight_copies(s, cfg, place)
    hidden = tokens * s["hidden"]
    head = s["vocabulary"] * s["hidden"]
    logits = min(CHUNK, tokens * s["vocabulary"])
    wide = 1 if has_bfloat16(cfg) else 2  # what is computed in float32 takes twice as much

    forward_end = {"activations": kept, "head and logits": 8 * logits + 18 * hidden, "gradients on the way": 0}
    head_backward = {
        "activations": kept,
        "head and logits": 6 * logits + 12 * hidden,
        "gradients on the way": (4 + 2 * wide) * head,
    }
    layer_backward = {
        "activations": kept + (layer if cfg.gradient_checkpointing else 0),
        "head and logits": 0,
        "gradients on the way": tokens * (2 * wide * s["mlp"] + 4 * s["hidden"]),
    }
    if place == "sharded":  # whole gradients wait until they are reduced over the ranks
        layer_backward["gradients on the way"] += 6 * s["layer"] + 2 * wide * head
    moments = (forward_end, head_backward, layer_backward)
    for moment, size in zip(moments, copies, strict=True):
        moment["weights as computed with"] = size
    return max(moments, key=lambda parts: sum(parts.values()))


def trainer_memory(s: dict, cfg, count: int, place: str) -> dict[str, float]:
    """Bytes of the trainer on each GPU, and on the host, by where the float32 weights and AdamW's moments
    are kept."""
    p = s["parameters"]
    copies = 2 if cfg.kl > 0 else 1  # the reference model
    loading = 0
    if place == "host":
        weights = 4 * p
        if has_bfloat16(cfg):
            weights = 2 * s["linear"] + 4 * (p - s["linear"])
        return {"weights": copies * weights, "loading": 0, "optimiser": 0, "gradients": 4 * p, "host": HOST * p}
    if place == "sharded":
        loading = 4 * max(s["outside"], s["layer"])  # what is being sharded is whole
    moments = 2.1 if cfg.optimizer == "adamw8bit" else 8
    # Copies of the model as loaded are made on the host, by each of the ranks of this machine.
    copied = (copies - 1 + (cfg.engine == "transformers")) if place == "sharded" else 0
    return {
        "weights": 4 * p * copies / count,
        "loading": loading,
        "optimiser": moments * p / count,
        "gradients": 4 * p / count,
        "host": LOAD * p + 4 * p * copied * min(count, 8),
    }


def engine_memory(s: dict, cfg, count: int) -> dict[str, float]:
    """Bytes of the engine on each GPU: its weights, what generating takes besides the KV cache, and what
    stays when the trainer updates."""
    p = s["parameters"]
    size = 2 if has_bfloat16(cfg) else 4
    if cfg.engine != "transformers":
        resident = not vllm_options(cfg).get("enable_sleep_mode", True)
        return {
            "weights": size * p / vllm_options(cfg).get("tensor_parallel_size", 1),
            "start": ENGINE,
            "work": ENGINE,
            "left": ENGINE if resident else ASLEEP,
            "resident": resident,
        }
    weights = 2 * p if has_bfloat16(cfg) else 0  # autocast's copies
    if count > 1:
        weights += 4 * p  # whole, to generate with
    answers = min(cfg.rollout_batch, cfg.prompts_per_step * cfg.answers_per_prompt)
    logits = 12 * answers * s["vocabulary"]  # these, log-probs and their sums
    return {"weights": weights, "start": 0, "work": logits, "left": 0, "resident": False}


def kv_cache(s: dict, cfg, gpu: float, held: float) -> dict[str, float]:
    """Bytes a token, in the pool and for all answers of a step at once; and how many whole answers the pool holds.

    held: bytes of the GPU that the trainer has when the engine takes its share.
    """
    answers = cfg.prompts_per_step * cfg.answers_per_prompt
    size = 2 if has_bfloat16(cfg) else 4
    if cfg.engine == "transformers":
        token = (size + 4) * s["layers"] * s["keys"]  # autocast leaves the keys in float32
        pool = min(cfg.rollout_batch, answers) * token * longest(cfg)
    else:
        options = vllm_options(cfg)
        parallel = options.get("tensor_parallel_size", 1)
        token = 2 * size * s["layers"] * s["keys"] / parallel
        share = cfg.gpu_memory * gpu
        if not cfg.gpu_memory:  # all that the trainer leaves
            share = min(gpu - RESERVE, USABLE * gpu - CONTEXT) - held
        left = int(share - size * s["parameters"] / parallel - ENGINE)
        pool = options.get("kv_cache_memory_bytes", 0) or max(left, 0)
    return {
        "token": token,
        "pool": pool,
        "all": token * (cfg.prompts_per_step * cfg.max_prompt_tokens + answers * cfg.max_tokens),
        "at_once": pool / (token * longest(cfg)),
    }


# ---------------------------------------------------------------- the plan


def plan(s: dict, cfg, count: int = 1, gpu: float = 0.0, host: float = 0.0, place: str = "") -> dict:
    """Memory of each of `count` GPUs of `gpu` bytes, phase by phase, and of the host of `host` bytes (0: not known).

    s: from `shape`. place: where the float32 weights and AdamW's moments are kept, as `choose` says. All in bytes.
    """
    reason = ""
    if not place:
        place, reason = choose(s, cfg, count, gpu, host)
    trainer = trainer_memory(s, cfg, count, place)
    engine = engine_memory(s, cfg, count)
    kv = kv_cache(s, cfg, gpu, trainer["weights"] + max(trainer["optimiser"], trainer["loading"]))
    kv["all"] /= count
    answers = cfg.prompts_per_step * cfg.answers_per_prompt

    weights = "weights, float32" if place != "host" else "weights"
    pool = {"engine's weights": engine["weights"], "KV cache": kv["pool"]}
    start = {weights: trainer["weights"] + trainer["loading"]}
    if cfg.engine != "transformers":
        start |= pool
    start[OTHER] = CONTEXT + engine["start"]

    rollout = {weights: trainer["weights"], "optimiser": trainer["optimiser"]}
    rollout |= pool
    rollout[OTHER] = CONTEXT + engine["work"]

    update = {weights: trainer["weights"], "optimiser": trainer["optimiser"], "gradients": trainer["gradients"]}
    update |= update_memory(s, cfg, place)
    if engine["resident"]:
        update |= pool
    update[OTHER] = CONTEXT + engine["left"]

    phases = {"start-up": start, "rollout": rollout, "update": update}
    peaks = {name: sum(parts.values()) for name, parts in phases.items()}
    fits = None
    if gpu:
        enough = not host or trainer["host"] <= host
        fits = max(peaks.values()) <= USABLE * gpu and kv["at_once"] >= 1 and enough
    return {
        "parameters": s["parameters"],
        "gpus": count,
        "gpu": gpu,
        "place": place,
        "reason": reason,
        "host": {"needs": trainer["host"], "has": host},
        "phases": phases,
        "peaks": peaks,
        "kv": kv,
        "activations": {
            on: activations(s, dataclasses.replace(cfg, gradient_checkpointing=on))[0] for on in (False, True)
        },
        "tokens": {"most": answers * cfg.max_tokens, "mean": answers * cfg.max_tokens // 2},
        "fits": fits,
    }


def choose(s: dict, cfg, count: int, gpu: float, host: float) -> tuple[str, str]:
    """Where the float32 weights and AdamW's moments are kept: "gpu", "host" or "sharded"; and why, in one line.

    ValueError for --offload on where it cannot be meant.
    """
    if cfg.offload == "on":
        if count > 1:
            raise ValueError("--offload on is for one GPU; over several the weights are sharded: leave it out")
        if cfg.optimizer == "adamw8bit":
            raise ValueError(
                "--offload on keeps AdamW's moments in float32 on the host: leave out --optimizer adamw8bit"
            )
        return "host", "--offload on asks for it"
    if count > 1:
        return "sharded", f"there are {count} GPUs"
    if cfg.offload == "off":
        return "gpu", "--offload off asks for it"
    if not gpu:
        return "gpu", "there is no GPU to compare with"
    if plan(s, cfg, count, gpu, host, "gpu")["fits"]:
        return "gpu", "everything fits there"
    if cfg.optimizer == "adamw8bit":
        return "gpu", "--optimizer adamw8bit is for the GPU"
    there = plan(s, cfg, count, gpu, host, "host")
    if there["fits"]:
        return "host", "on the GPU they do not fit beside the rest"
    if host and there["host"]["needs"] > host:
        needs = size(there["host"]["needs"])
        return "gpu", f"the host would need {needs} GiB of memory for them and has {size(host)}"
    return "gpu", "it does not fit with them on the host either"


# ---------------------------------------------------------------- what to change


@dataclasses.dataclass
class Change:
    """Something to do so that a run fits."""

    text: str = ""  # a flag; of vLLM's options one flag is made at the end
    settings: dict = dataclasses.field(default_factory=dict)  # of the configuration
    options: dict = dataclasses.field(default_factory=dict)  # of vLLM
    gpus: int = 0  # so many in place of what is there


def changed(cfg, count: int, found: list[Change]):
    """Configuration and number of GPUs with these changes."""
    for change in found:
        settings = dict(change.settings)
        if change.options:
            settings["vllm"] = json.dumps(vllm_options(cfg) | change.options)
        cfg = dataclasses.replace(cfg, **settings)
        count = change.gpus or count
    return cfg, count


def candidates(s: dict, cfg, gpu: float) -> tuple[list[Change], list[list[Change]]]:
    """What costs time, least first, and last moments in 8 bits; and the choices there are of memory for the KV
    cache."""
    steps = []
    if cfg.offload == "off":
        steps.append(Change("--offload auto", {"offload": "auto"}))
    if cfg.tokens_per_microbatch > longest(cfg):
        steps.append(Change(f"--tokens-per-microbatch {longest(cfg)}", {"tokens_per_microbatch": longest(cfg)}))
    if not cfg.gradient_checkpointing:
        steps.append(Change("--gradient-checkpointing", {"gradient_checkpointing": True}))
    if cfg.optimizer == "adamw" and cfg.offload != "on":
        steps.append(Change("--optimizer adamw8bit", {"optimizer": "adamw8bit"}))
    if cfg.engine == "transformers":
        return steps, [[], [Change("--rollout-batch 16", {"rollout_batch": 16})]]
    if engine_memory(s, cfg, 1)["resident"]:
        steps.append(Change(options={"enable_sleep_mode": True}))
    caches = [[]]
    if cfg.gpu_memory:
        caches.append([Change("--gpu-memory 0", {"gpu_memory": 0.0})])
    for gigabytes in (40, 20, 10, 5):
        pool = gigabytes * GIB
        one = kv_cache(s, cfg, gpu, 0)["token"] * longest(cfg)
        if one <= pool < gpu:
            caches.append([Change(options={"kv_cache_memory_bytes": pool})])
    return steps, caches


def search(s: dict, cfg, count: int, gpu: float, host: float = 0.0) -> list[Change] | None:
    """The least to change so that it fits; nothing if it does, None if nothing of this helps."""

    def fits(found: list[Change]) -> bool:
        other, number = changed(cfg, count, found)
        if number > 1 and other.offload == "on":
            return False
        return plan(s, other, number, gpu, host)["fits"]

    if fits([]):
        return []
    steps, caches = candidates(s, cfg, gpu)
    more = [[]]
    for number in (2, 4, 8, 16, 32, 64):
        if number > count:
            text = f"{number} such GPUs: torchrun --nproc-per-node {min(number, 8)}"
            more.append([Change(text, gpus=number)])

    # more GPUs last, then a smaller KV cache, then more and more of the steps
    for gpus in more:
        for cache in caches:
            for k in range(len(steps) + 1):
                found = steps[:k] + cache + gpus
                if not fits(found):
                    continue
                # the earlier steps may not be needed any more
                for step in steps[:k]:
                    rest = [other for other in found if other is not step]
                    if fits(rest):
                        found = rest
                return found
    return None


def changes(s: dict, cfg, count: int, gpu: float, host: float = 0.0) -> list[str] | None:
    """`search` as flags to give."""
    found = search(s, cfg, count, gpu, host)
    if found is None:
        return None
    options = f"--vllm '{changed(cfg, count, found)[0].vllm}'"
    texts = [change.text or options for change in found]
    return list(dict.fromkeys(texts))  # two options of vLLM are one flag


# ---------------------------------------------------------------- the machine


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


def free_memory() -> float:
    """Bytes of this GPU that this process can have: all, but for what other programs hold."""
    free, total = torch.cuda.mem_get_info()
    own = CONTEXT + torch.cuda.memory_reserved()
    return float(total if total - free <= own else free + torch.cuda.memory_reserved())


def host_memory(root: Path = Path("/")) -> float:
    """Bytes of host memory that this process can still have; 0 where it cannot be known.

    The kernel kills what overruns it, without a word. A container's limit is its control group's.
    """
    try:
        fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        least = 1024 * float(fields["MemAvailable"].split()[0])
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError, ValueError):
        return 0.0
    for line in groups:
        _, kinds, group = line.split(":", 2)
        folder = root / "sys/fs/cgroup"
        names = ("memory.max", "memory.current", "inactive_file")
        if "memory" in kinds.split(","):  # the first version of control groups
            folder = folder / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif kinds:
            continue
        # a limit of any group above binds, too; within a container the path may not be there
        parts = [part for part in group.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            least = min(least, room_in(folder.joinpath(*parts[:depth]), *names))
    return max(least, 0.0)


def room_in(folder: Path, limit: str, usage: str, cache: str) -> float:
    """Bytes that a control group has left; infinite where it sets no limit. A file cache that is idle is
    free."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return float("inf")
        used = float((folder / usage).read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == cache:
                used -= float(value)
        return float(most) - used
    except (OSError, ValueError):
        return float("inf")


# ---------------------------------------------------------------- for reading


def size(number: float) -> str:
    """GiB."""
    if number and number < 0.05 * GIB:
        return f"{number / GIB:.2g}"
    return f"{number / GIB:.1f}"


def table(found: dict) -> str:
    """The plan for reading."""
    kv = found["kv"]
    phases = found["phases"]
    one = found["gpus"] == 1

    title = f"memory planned on {'the' if one else 'each'} GPU, in GiB"
    lines = [f"{title:40}" + "".join(f"{phase:>10}" for phase in phases)]
    names = [*phases["update"], *phases["rollout"]]  # the order in which they are shown
    names = [name for name in dict.fromkeys(names) if name != OTHER] + [OTHER]
    for name in names:
        cells = [size(parts[name]) if parts.get(name) else "" for parts in phases.values()]
        lines.append(f"  {name:38}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(f"  {'together':38}" + "".join(f"{size(peak):>10}" for peak in found["peaks"].values()))

    has = found["host"]["has"]
    needs = f"host memory: {size(found['host']['needs'])} GiB"
    there = f"; {size(has)} GiB are free" if has else ""
    if found["place"] == "host":
        reason = found["reason"] or "as asked for"
        lines.append(f"{needs} for float32 weights and AdamW's moments, load and save included{there} ({reason})")
    elif found["place"] == "sharded":
        lines.append(f"{needs}, of all ranks together, while the weights are loaded{there}")
    on = found["activations"]
    lines.append(f"activations of a micro-batch: {size(on[False])} GiB, with gradient checkpointing {size(on[True])}")
    whole = f"{size(kv['all'])} GiB for {'all' if one else 'its'} answers of a step at full length"
    holds = ""
    if kv["pool"]:
        holds = f"; {size(kv['pool'])} GiB hold {kv['at_once']:,.1f} such answers at once"
    lines.append(f"KV cache: {kv['token'] / 1024:,.1f} KiB a token, {whole}{holds}")
    return "\n".join(lines)


def verdict(s: dict, cfg, found: dict) -> str:
    """Whether it fits, and if not what to change, in one line."""
    count = found["gpus"]
    gpu = found["gpu"]
    if not gpu:
        return "no GPU here to compare with; say which you have: --gpus 8x80"
    have = f"{count} GPU{'s' if count > 1 else ''} of {gpu / GIB:.0f} GB ({USABLE * gpu / GIB:.1f} GiB usable)"
    if found["fits"]:
        line = f"fits {have}: {size(max(found['peaks'].values()))} GiB at most"
        if found["place"] == "host":
            line += f", and {size(found['host']['needs'])} GiB on the host"
        if found["peaks"]["update"] > (1 - CLOSE) * USABLE * gpu:
            spare = size(USABLE * gpu - found["peaks"]["update"])
            line += f"; close: {spare} GiB to spare in the update, and the plan has not been measured"
        if count > 1:
            line += f"; start it with torchrun --nproc-per-node {min(count, 8)} train.py ..."
        return line

    worst = max(found["peaks"], key=found["peaks"].get)
    why = f"{size(found['peaks'][worst])} GiB in the {worst} phase"
    if found["reason"].startswith("the host"):
        why += f", and {found['reason']}"
    elif found["peaks"][worst] > USABLE * gpu:
        pass
    elif found["kv"]["at_once"] < 1:
        why = "the KV cache does not hold one whole answer"
    else:
        why = f"{size(found['host']['needs'])} GiB on the host, which has {size(found['host']['has'])}"
    change = changes(s, cfg, count, gpu, found["host"]["has"])
    how = "take larger GPUs or a smaller model"
    if change:
        how = "change " + ", ".join(change)
    return f"does not fit {have}: {why}; {how}"


def with_engine(cfg):
    """The configuration with the engine that a run on this machine has."""
    engine, _ = choose_engine(cfg.engine)
    return dataclasses.replace(cfg, engine=engine)


def out_of_memory(cfg, config) -> str:
    """What to tell whose run got out of GPU memory, in one line."""
    cfg = with_engine(cfg)
    s = shape(config)
    count = int(os.environ.get("WORLD_SIZE", 1))
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the run's masters may be part of it
    found = plan(s, cfg, count, found_gpus()[1], host_memory() + own)
    line = verdict(s, cfg, found)
    if found["fits"]:
        options = ["--gpu-memory below what vLLM took"]
        if cfg.tokens_per_microbatch > longest(cfg):
            options.insert(0, f"--tokens-per-microbatch {longest(cfg)}")
        if found["place"] == "gpu" and cfg.optimizer == "adamw":
            options.insert(0, "--offload on")
        line = f"by the plan it {line}. Is another process on it? Else change {', or '.join(options)}"
    return f"out of GPU memory: {line} (the plan: --dry-run); --resume goes on from the newest checkpoint"


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


def report(cfg, origins: dict[str, str], config, tokenizer, prompts: list) -> str:
    """All of --dry-run: configuration with what set it, first prompt, tokens of a step, memory, verdict.

    ValueError for a --gpus that cannot be read and for answers that the model's context does not hold.
    """
    s = shape(config)
    count, gpu = found_gpus(cfg.gpus)
    host = 0.0 if cfg.gpus else host_memory()  # that of another machine is not known
    if s["context"] and longest(cfg) > s["context"]:
        raise ValueError(
            f"--max-prompt-tokens {cfg.max_prompt_tokens} and --max-tokens {cfg.max_tokens} make {longest(cfg)} "
            f"tokens, and the model has a context of {s['context']}; lower one of them"
        )
    lines = ["configuration, and what set it where it is no default"]
    for field in dataclasses.fields(cfg):
        value = repr(getattr(cfg, field.name))
        lines.append(f"   {field.name:24}{value:24} {origins.get(field.name, '')}".rstrip())

    first = prompts[0]
    lines.append(
        f"first of {len(prompts):,} prompts as the model sees it, {len(first.ids)} tokens; answer: {first.answer}"
    )
    for line in tokenizer.decode(first.ids).split("\n"):
        lines.append(f"  | {line}")

    if not cfg.gpus:
        cfg = with_engine(cfg)  # on another machine vLLM is there
    found = plan(s, cfg, count, gpu, host)
    answers = cfg.prompts_per_step * cfg.answers_per_prompt
    most = found["tokens"]["most"]
    mean = found["tokens"]["mean"]
    lines += [
        f"one step: {cfg.prompts_per_step} prompts x {cfg.answers_per_prompt} answers = {answers:,} answers, at most "
        f"{most:,} tokens; {mean:,} if answers are half of --max-tokens on average",
        f"model: {s['parameters']:,} parameters in {s['layers']} layers, context {s['context']:,}",
        table(found),
    ]
    if cfg.gpus and found["place"] == "host" and host_memory():
        lines.append(f"host memory that is free on this machine, if it is the one: {size(host_memory())} GiB")
    lines.append(verdict(s, cfg, found))
    if gpu:
        name = "" if cfg.gpus else torch.cuda.get_device_name()
        lines.append(costs.line(s, cfg, found, name))
    return "\n".join(lines)
