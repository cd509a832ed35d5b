"""Float32 weights and AdamW in host memory, for one GPU that has no room for them: `--offload`.

The GPU holds what a pass computes with. Weights of linear layers are in bf16 there, as autocast would cast them
anyway; all others (embedding, norms) and all gradients are in float32. So nothing is rounded that was not rounded
before. On a CPU a run with offload is the run without, bit for bit (tests/test_offload.py).

Bytes a parameter: 6 and a little on the GPU instead of 16, and 12 in host memory instead of none.
"""

import contextlib
import copy

import torch

from support import plan, ranks

CROWDED = 0.1  # share of a GPU that other programs hold, from which on it is not tried against the plan
THREADS = torch.get_num_threads()  # before vLLM is imported, which leaves the process with one


# ---------------------------------------------------------------- where the masters are kept


def wants_offload(cfg, path: str) -> bool:
    """Whether float32 weights and AdamW go to host memory, for a run of the model at `path`. Prints it and why.

    ValueError, in one line, for an --offload on that cannot be meant, or for which host memory is too small; and where
    by the plan it does not fit, with --offload auto, or on a GPU that other programs have filled in part.
    """
    if cfg.offload != "on" and not torch.cuda.is_available():
        return False
    kind, _ = plan.read(path)
    sizes = plan.shape(kind)
    cfg = plan.with_engine(cfg)
    has = plan.host_memory()

    # What other programs hold of a GPU is not there for the plan. Ranks decide alike, by the fullest.
    _, gpu = plan.found_gpus()
    free = -ranks.largest(-plan.free_memory()) if gpu else 0.0
    found = plan.plan(sizes, cfg, ranks.WORLD, min(gpu, free), has)
    taken = ""
    if free < gpu:
        taken = f"; other programs hold {plan.size(gpu - free)} GiB of the GPU, see nvidia-smi"
    place = found["place"]
    needs = plan.HOST * sizes["parameters"]
    if place == "host" and 0 < has < needs:
        raise ValueError(
            f"--offload on needs {plan.size(needs)} GiB of host memory for float32 weights and AdamW's moments, "
            f"and {plan.size(has)} GiB can be had; take a machine with more, or --offload off"
        )
    crowded = gpu - free > CROWDED * gpu
    if gpu and not found["fits"] and (cfg.offload == "auto" or crowded):
        verdict = plan.verdict(sizes, cfg, found)
        all_the_same = "" if crowded else " (--offload on or off starts it all the same)"
        raise ValueError(f"by the plan it {verdict}{taken}{all_the_same}")
    if ranks.is_main():
        where = {"host": "in host memory", "gpu": "on the GPU", "sharded": "sharded over the GPUs"}[place]
        print(f"float32 weights and AdamW: {where} ({found['reason']}{taken})")
    return place == "host"


# ---------------------------------------------------------------- the copy that is computed with


def low_precision(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that autocast casts at every use: of linear layers, unless tied to an embedding."""
    embeddings = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            embeddings.add(id(module.weight))
    linear = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            for parameter in module.parameters(recurse=False):
                linear[id(parameter)] = parameter
    return [parameter for number, parameter in linear.items() if number not in embeddings]


def working_copy(masters: torch.nn.Module, dtype: str, device: str | None = None) -> torch.nn.Module:
    """`masters` once more, to compute with in `dtype`, on `device` (by default the GPU, if there is one). The
    gradients of its parameters are float32, whatever they are themselves."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    low = set()
    if dtype == "bfloat16":
        low = {id(parameter) for parameter in low_precision(masters)}

    # The memo tells deepcopy what to take for each parameter: there is never a second float32 one on the host,
    # and a tied weight stays one.
    memo = {}
    for parameter in masters.parameters():
        kind = torch.bfloat16 if id(parameter) in low else parameter.dtype
        weight = torch.nn.Parameter(parameter.detach().to(device, kind, copy=True))
        weight.grad_dtype = torch.float32
        weight.master_on_host = True  # for who asks what the optimiser will take of the GPU
        memo[id(parameter)] = weight
    return copy.deepcopy(masters, memo).to(device)


# ---------------------------------------------------------------- the optimiser


@contextlib.contextmanager
def cpu_threads(count: int):
    """Runs its block with `count` threads, and puts the count back: with another one, Dynamo in vLLM would compile
    again."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class HostAdamW(torch.optim.AdamW):
    """AdamW on `masters`, float32 weights in host memory, by the gradients of `working`, their working copy.

    It is saved and loaded as any AdamW over `masters`. A step leaves no gradients, and brings the working copy up to
    date. It takes one parameter at a time, so that only one gradient is ever in host memory.
    """

    def __init__(self, masters: torch.nn.Module, working: torch.nn.Module, threads: int = 0, **settings):
        super().__init__(masters.parameters(), fused=True, **settings)
        self.pairs = list(zip(masters.parameters(), working.parameters(), strict=True))
        self.threads = threads or THREADS

        # One buffer, because a fresh allocation for each parameter is slow; pinned, for faster copies.
        largest = max(weight.numel() for weight, _ in self.pairs)
        self.staging = torch.empty(largest, dtype=torch.float32, pin_memory=torch.cuda.is_available())

        # Moments as the first step would make them: a checkpoint can be read into them before any step. Their
        # pages are taken here, at which one thread alone would be slow.
        with cpu_threads(self.threads):
            for weight, _ in self.pairs:
                self.state[weight] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step. The gradients have been clipped, on the GPU, by the norm over all of them."""
        with cpu_threads(self.threads):
            for weight, working in self.pairs:
                if working.grad is None:
                    continue
                gradient = self.staging[: weight.numel()].view_as(weight)
                weight.grad = gradient.copy_(working.grad)
                working.grad = None
                super().step()  # of this weight alone: no other has a gradient
                weight.grad = None
        self.push()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Lets go of the gradients of the working copy; the masters never keep any."""
        for _, working in self.pairs:
            working.grad = None

    @torch.no_grad()
    def push(self) -> None:
        """Copies the masters' weights into the working copy."""
        with cpu_threads(self.threads):
            for weight, working in self.pairs:
                # rounded on the host: half the bytes to move
                room = self.staging.view(working.dtype)[: weight.numel()].view_as(weight)
                working.copy_(room.copy_(weight))

    def load_state_dict(self, state_dict: dict) -> None:
        """As AdamW's; the masters' weights, which are loaded before it, go into the working copy."""
        super().load_state_dict(state_dict)
        self.push()
