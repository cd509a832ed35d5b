"""Attention over packed sequences without a mask: each token sees its own sequence, up to itself.

transformers would make a mask of L x L for packed sequences, and scaled_dot_product_attention is slow with one. Here
the borders of sequences are read from position_ids, which restart at 0 with each. On a GPU in bf16 PyTorch's own
variable-length kernel computes it. Elsewhere a loop over the sequences does, which says what the kernel has to
compute (tests/test_attention.py).

Letters: R rows of L tokens, S sequences, T = R * L tokens, H query heads, K key heads, D size of a head.
"""

from functools import lru_cache

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed_varlen"  # what a model calls it; support/logprobs.has_varlen knows it by the second word


@lru_cache(maxsize=1)  # every layer asks, and an answer waits for the GPU
def borders(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """position_ids [R, L] -> where each sequence starts in R * L, and at the end R * L, int32 [S + 1]; and
    the length of the longest. Each row starts a sequence, too."""
    starts = position_ids == 0
    starts[:, 0] = True
    starts = starts.flatten().nonzero()[:, 0]
    edges = torch.cat([starts, starts.new_tensor([position_ids.numel()])])
    return edges.to(torch.int32), int(edges.diff().max())


def reference(query, key, value, edges: torch.Tensor, scale: float, window: int | None = None):
    """query [T, H, D], key and value [T, K, D] -> [T, H, D], sequence by sequence. window: a token sees at most
    so many, itself included."""
    parts = []
    edges = edges.tolist()
    for start, end in zip(edges, edges[1:], strict=False):
        # Causal alone needs no mask; a window does, where the sequence is longer.
        rows = [x[start:end].transpose(0, 1)[None] for x in (query, key, value)]  # [1, heads, length, D]
        mask = None
        if window is not None and window < end - start:
            distance = torch.arange(end - start, device=query.device)
            distance = distance[:, None] - distance
            mask = (distance >= 0) & (distance < window)
        part = scaled_dot_product_attention(
            *rows,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def kernel(query, key, value, edges: torch.Tensor, longest: int, scale: float, window: int | None = None):
    """The same as `reference` in bf16 on a GPU. longest: length of the longest sequence."""
    # A window goes so many to the left of a token, and none to its right.
    left = -1 if window is None else window - 1
    return varlen_attn(
        query,
        key,
        value,
        edges,
        edges,
        longest,
        longest,
        scale=scale,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    position_ids=None,
    **rest,
) -> tuple[torch.Tensor, None]:
    """What a model's layer calls. query [R, H, L, D], key and value [R, K, L, D] -> [R, L, H, D], and None.

    Whatever has a mask or a cache is no packed batch (it is generation), and goes the usual way. ValueError for
    models that cap their attention or give it sinks, which the kernel does not know.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    if rest.get("softcap") is not None or rest.get("s_aux") is not None:
        raise ValueError(f"{NAME} attention knows neither caps nor sinks; use a model without them")

    # Where the sequences are: rows without positions of their own are a sequence each.
    rows, _, length, size = query.shape
    if position_ids is None:
        position_ids = torch.arange(length, device=query.device)[None]
    if len(position_ids) != rows:
        position_ids = position_ids.expand(rows, length)
    edges, longest = borders(position_ids)

    # Autocast does not know the kernel: queries and keys may come in float32 from their norms.
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    packed = [x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value)]  # [T, heads, D]
    scale = size**-0.5 if scaling is None else scaling
    if query.is_cuda and dtype == torch.bfloat16:
        out = kernel(*packed, edges, longest, scale, sliding_window)
    else:
        out = reference(*packed, edges, scale, sliding_window)
    return out.unflatten(0, (rows, length)), None


def mask(q_length: int, kv_length: int, attention_mask=None, **rest) -> torch.Tensor | None:
    """What transformers asks for the mask: none for packed sequences, else that of generation."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **rest)


def knows(config) -> bool:
    """Whether the kernel computes what layers of this kind of model compute."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kinds = set(getattr(text, "layer_types", None) or ())
    capped = getattr(text, "attn_logit_softcapping", None)
    return size <= 256 and kinds <= {"full_attention", "sliding_attention"} and not capped


def use(model) -> None:
    """Has `model` compute its attention here from now on."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)
