"""Models as Hugging Face has them: loading, what has to be switched off before training, and the optimiser."""

import contextlib
from types import SimpleNamespace

import torch

from support import attention, offload, ranks
from support.logprobs import has_varlen, pack


def load_model(path: str, gradient_checkpointing: bool = False, device: str | None = None):
    """Model in float32 (bf16 weights do not move at lr 1e-6), tokenizer, and the ids that end an answer.

    The model is on the GPU if there is one. For several ranks it is on the CPU, and only the first one has read its
    weights: sharding takes them from there layer by layer (ranks.shard), since no GPU need hold them. ValueError, in
    one line, if no model can be loaded from `path`.
    """
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with in_one_line(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    model = ranks.on_main(lambda: with_weights(path))
    if model is None:
        model = without_weights(path)

    # An answer may end in any of the ids that the model's own generation stops at.
    stop = model.generation_config.eos_token_id
    stop_ids = set(stop) if isinstance(stop, list) else {stop}
    stop_ids.add(tokenizer.eos_token_id)
    stop_ids.discard(None)
    if not all(isinstance(one, int) for one in stop_ids):
        raise ValueError(f"eos_token_id {stop!r} of the model in {path} is no number of a token; mend its config")
    stop_ids = ranks.from_main(sorted(stop_ids))

    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if device is None:
        device = "cuda" if torch.cuda.is_available() and ranks.WORLD == 1 else "cpu"
    model = model.to(device).eval()
    without_dropout(model)
    return model, tokenizer, stop_ids


@contextlib.contextmanager
def in_one_line(path: str):
    """Turns an error of transformers into ValueError: it raises half a dozen kinds, some with pages of text."""
    try:
        yield
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no model can be loaded from {path!r} ({type(error).__name__}: {first}); give a Hugging Face id, or "
            "a folder with config, weights and tokenizer"
        ) from error


def with_weights(path: str):
    """The model at `path` in float32. ValueError, in one line, if it cannot be read, or not whole."""
    from transformers import AutoModelForCausalLM

    with in_one_line(path):
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    check_weights(path, model, report)
    return model


def without_weights(path: str):
    """The model at `path` in float32, its weights not read. They have addresses and take no memory: the system gives
    that when they are first written."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    model.tie_weights()
    return model


def check_weights(path: str, model, report: dict) -> None:
    """ValueError where tensors of the model are not in its files, which transformers then draws at random; where its
    files have some that it does not use; and where a weight is not finite. report: transformers' loading info."""
    for kind, wrong in (("missing_keys", "lacks"), ("unexpected_keys", "has, and its config does not know,")):
        names = sorted(report[kind])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the model in {path} {wrong} {names[0]}{more}; give whole weights, and their own config")
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise ValueError(f"the model in {path} has weights that are not finite, in {name}; give a sound one")


def check_context(model, model_path: str, cfg) -> None:
    """ValueError if the longest prompt and answer together are more than the model can read."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path) if model is None else model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = cfg.max_prompt_tokens + cfg.max_tokens
    if context and wanted > context:
        what = f"{model_path} has a context of {context}, but prompt and answer may take {wanted}"
        raise ValueError(f"{what}; lower --max-tokens, or in training --max-prompt-tokens")


def without_dropout(model) -> None:
    """The policy that is trained has to be the one that sampled; dropout would make it another at every
    pass."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def use_varlen_attention(model, dtype: str = "bfloat16") -> bool:
    """On a GPU, in bf16, the model gets attention that needs no mask of L x L for packed sequences
    (support/attention.py). Elsewhere, and in a model that does not know it, transformers' own choice stays. Returns
    whether there is something new to check: a model that is still on its way to a GPU cannot run it."""
    if dtype != "bfloat16" or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability() < (8, 0) or not attention.knows(model.config):
        return False
    attention.use(model)
    return model.device.type == "cuda"


def check_policy(policy) -> None:
    """ValueError where the forward of `policy` (grpo.Policy) is not the model's own: heads that scale, cap
    or shift their logits, and layers that do not keep packed answers apart."""
    ranks.on_main(lambda: compare_with_own(policy))  # the others have no weights yet


@torch.no_grad()
def compare_with_own(policy) -> None:
    """`check_policy` of this rank."""
    model = policy.model
    low = has_varlen(model)  # these kernels know no float32
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.tensor([[(7 * i + 13 * j + 1) % vocabulary for j in range(6)] for i in range(2)])
    pair = [SimpleNamespace(prompt=tuple(row[:2].tolist()), tokens=row[2:]) for row in ids]
    (micro,) = pack(pair, 12, row_length=12, device=model.device)
    dtype = policy.dtype
    policy.dtype = torch.bfloat16 if low else torch.float32
    with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
        ours, _ = policy(micro, 1.0)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    policy.dtype = dtype
    own = torch.log_softmax(logits[:, 1:-1], -1).gather(2, ids[:, 2:, None].to(model.device))[..., 0]
    off = (ours - own[micro.sequences].flatten()).abs().max()
    if not off <= (0.2 if low else 1e-2):  # nan is no number that passes
        raise ValueError(
            f"{model.config.model_type} models scale, cap or shift their logits, or cannot be packed, and would be "
            "trained on wrong log-probs; use a Qwen3, Llama, Mistral, Gemma 3, OLMo or alike"
        )


def make_optimizer(trained: torch.nn.Module, cfg, working=None) -> torch.optim.Optimizer:
    """AdamW over the float32 weights of `trained`: in bf16 a weight does not move at lr 1e-6.

    working: the module that has the gradients, where that is not `trained` itself (support/offload.py). ValueError
    if torchao is missing.
    """
    settings = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    if working is not None and working is not trained:
        return offload.HostAdamW(trained, working, cfg.threads, **settings)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(trained.parameters(), **settings, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(f"--optimizer adamw8bit needs torchao: pip install torchao ({error})") from error
    return AdamW8bit(trained.parameters(), **settings)
