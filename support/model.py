"""Models as Hugging Face has them: loading, what has to be switched off before training, and the optimiser."""

import torch

from support import attention, offload, ranks


def load_model(path: str, gradient_checkpointing: bool = False, device: str | None = None):
    """Model in float32 (bf16 weights do not move at lr 1e-6), tokenizer, and the ids that end an answer.

    The model is on the GPU if there is one, but for several ranks on the CPU: sharding takes it from there
    layer by layer, since it need not fit. ValueError, in one line, if no model can be loaded from `path`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # transformers raises half a dozen kinds here, some with pages of text
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no model can be loaded from {path!r} ({type(error).__name__}: {first}); give a Hugging Face id, or "
            "a folder with config, weights and tokenizer"
        ) from error

    # An answer may end in any of the ids that the model's own generation stops at.
    stop = model.generation_config.eos_token_id
    stop_ids = set(stop) if isinstance(stop, list) else {stop}
    stop_ids.add(tokenizer.eos_token_id)
    stop_ids.discard(None)

    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if device is None:
        device = "cuda" if torch.cuda.is_available() and ranks.world() == 1 else "cpu"
    model = model.to(device).eval()
    without_dropout(model)
    return model, tokenizer, sorted(stop_ids)


def without_dropout(model) -> None:
    """The policy that is trained has to be the one that sampled; dropout would make it another at every pass."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def use_varlen_attention(model, dtype: str = "bfloat16") -> None:
    """On a GPU, in bf16, the model gets attention that needs no mask of L x L for packed sequences
    (support/attention.py). Elsewhere transformers' own choice stays."""
    if dtype != "bfloat16" or not torch.cuda.is_available():
        return
    if torch.cuda.get_device_capability() >= (8, 0) and attention.knows(model.config):
        attention.use(model)


def make_optimizer(trained: torch.nn.Module, cfg, working=None) -> torch.optim.Optimizer:
    """AdamW over the float32 weights of `trained`: in bf16 a weight does not move at lr 1e-6.

    working: the module that has the gradients, where that is not `trained` itself (support/offload.py).
    ValueError if torchao is missing.
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
