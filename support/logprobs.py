"""From answers to the log-probs of their tokens: packing without padding, and never the full logits.

Answers are flat lists of tokens with lengths. There is no padding and no mask, so none can be wrong; the end-of-text
token is an ordinary token of the answer, because the model must learn to stop.

Letters: S sequences, N answer tokens, R rows of L tokens, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers.utils import is_flash_attn_2_available

from support import ranks


class _ChunkedLogProb(torch.autograd.Function):
    """log-prob and entropy of targets from hidden states, a chunk of tokens at a time: [N, V] logits never exist."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, inverse_temperature, chunk):
        logprob = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy, normaliser = torch.empty_like(logprob), torch.empty_like(logprob)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).float().mul_(inverse_temperature)  # [chunk, V]
            most = logits.amax(-1)
            odds = (logits - most[:, None]).exp_()  # once, for the normaliser and the entropy
            total = odds.sum(-1)
            normaliser[rows] = most + total.log()
            logprob[rows] = logits.gather(1, targets[rows, None])[:, 0] - normaliser[rows]
            entropy[rows] = normaliser[rows] - odds.mul_(logits).sum(-1) / total
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.inverse_temperature, ctx.chunk = inverse_temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = (hidden[rows] @ weight.T).float().mul_(ctx.inverse_temperature)
            size = (grad[rows] * ctx.inverse_temperature)[:, None]  # d logprob / d logits = onehot - softmax
            slope = logits.sub_(normaliser[rows, None]).exp_().mul_(-size)
            slope = slope.scatter_add_(1, targets[rows, None], size).to(weight.dtype)
            grad_hidden[rows] = slope @ weight
            grad_weight += slope.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden, weight, targets, temperature: float = 1.0, chunk: int | None = None):
    """log-prob of `targets` [N] and entropy [N] of softmax(hidden [N, H] @ weight [V, H].T / temperature), in float32.
    `chunk` tokens at a time; by default as many as make 128 MiB of logits (512 on a GPU).

    Divided by the sampling temperature, because that is the distribution the answers were drawn from. The entropy is
    for the log and carries no gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        # by hand, because autocast is off in the backward pass, and logits made anew in float32 would not fit
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    chunk = chunk or max((2**27 if hidden.is_cuda else 2**25) // len(weight), 1)
    return _ChunkedLogProb.apply(hidden, weight, targets, 1.0 / temperature, chunk)


@dataclass
class Sequence:
    """One answer to train on: what came before it, its tokens and log-probs as sampled, and its place in the log."""

    prompt: tuple[int, ...]  # token ids
    tokens: torch.Tensor  # [T] int, end of text inside
    behaviour: torch.Tensor  # [T] float32, log mu
    advantage: float
    age: int  # steps since it was sampled; 0 is fresh
    count: int = 1  # equal answers of one group are trained once, with their number as weight

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass
class MicroBatch:
    """Sequences packed without padding into rows; R rows of L tokens, N answer tokens in all."""

    input_ids: torch.Tensor  # [R, L]
    position_ids: torch.Tensor  # [R, L], restarts at 0 with each sequence: the model reads the borders from it
    index: torch.Tensor  # [N] where, in R * L, the hidden state stands that predicts each answer token
    targets: torch.Tensor  # [N]
    segment: torch.Tensor  # [N] which sequence, counted within this micro-batch
    sequences: list[int]  # their numbers in the list given to `pack`


def pack(sequences: list[Sequence], tokens: int, row_length: int | None = None, device="cpu") -> list[MicroBatch]:
    """Micro-batches of at most `tokens` tokens each (or one sequence, where one alone is longer), longest first.

    Rows are no longer than the longest sequence unless `row_length` says so: attention without a variable-length kernel
    costs rows * L^2, so that short rows are cheap, and several short sequences still share a row.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    batches: list[MicroBatch] = []
    while order:
        length = max(len(sequences[order[0]]), row_length or 0)
        rows: list[list[int]] = []
        room: list[int] = []
        waiting = []
        for i in order:  # first fit, longest first
            size = len(sequences[i])
            row = next((r for r, free in enumerate(room) if free >= size), None)
            if row is None and (not rows or (len(rows) + 1) * length <= tokens):
                rows.append([])
                room.append(length)
                row = len(rows) - 1
            if row is None:
                waiting.append(i)
                continue
            rows[row].append(i)
            room[row] -= size
        batches.append(_fill(sequences, rows, device))
        order = waiting
    return batches


def _fill(sequences: list[Sequence], rows: list[list[int]], device) -> MicroBatch:
    input_ids, position_ids, index, targets, lengths = [], [], [], [], []
    length = max(sum(len(sequences[i]) for i in row) for row in rows)
    for r, row in enumerate(rows):
        start = r * length
        for i in row:
            s = sequences[i]
            input_ids += [torch.tensor(s.prompt, dtype=torch.long), s.tokens.long()]
            position_ids.append(torch.arange(len(s)))
            first = start + len(s.prompt) - 1  # the last prompt token predicts the first answer token
            index.append(torch.arange(first, first + len(s.tokens)))
            targets.append(s.tokens.long())
            lengths.append(len(s.tokens))
            start += len(s)
        tail = (r + 1) * length - start  # unused room becomes a sequence of its own, that nothing looks at
        input_ids.append(torch.zeros(tail, dtype=torch.long))
        position_ids.append(torch.arange(tail))
    return MicroBatch(
        torch.cat(input_ids).view(-1, length).to(device),
        torch.cat(position_ids).view(-1, length).to(device),
        torch.cat(index).to(device),
        torch.cat(targets).to(device),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device),
        [i for row in rows for i in row],
    )


def model_logprobs(model, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log-prob and entropy of every answer token of `batch`, [N] each.

    No mask and no cache: given either, transformers silently lets packed sequences see their neighbours.
    """
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False
    ).last_hidden_state
    chosen = hidden.flatten(0, 1)[batch.index]  # [N, H]: only what predicts an answer token meets the vocabulary
    return token_logprobs(chosen, model.get_output_embeddings().weight, batch.targets, temperature)


def has_varlen(model) -> bool:
    """Whether its attention reads the borders of sequences from position_ids. Packing all into one row then costs
    nothing, and is required."""
    return "flash" in (model.config._attn_implementation or "")


def check_model(model) -> None:
    """ValueError where `model_logprobs` is not the model's own forward: heads that scale, cap or shift their logits,
    and layers that do not keep packed sequences apart."""
    low = has_varlen(model)  # these kernels know no float32
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.tensor([[(7 * i + 13 * j + 1) % vocabulary for j in range(6)] for i in range(2)])
    pair = [Sequence(tuple(row[:2].tolist()), row[2:], torch.zeros(4), 0.0, 0) for row in ids]
    (micro,) = pack(pair, 12, row_length=12, device=model.device)
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=low):
        ours, _ = model_logprobs(model, micro, 1.0)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    own = torch.log_softmax(logits[:, 1:-1], -1).gather(2, ids[:, 2:, None].to(model.device))[..., 0]
    if (ours - own[micro.sequences].flatten()).abs().max() > (0.2 if low else 1e-2):
        raise ValueError(
            f"{model.config.model_type} models scale, cap or shift their logits, or cannot be packed, and would be "
            "trained on wrong log-probs; use a Qwen3, Llama, Mistral, Gemma 3, OLMo or alike"
        )


def choose_attention(model, name: str) -> None:
    """Checks `model`, and gives it the attention called `name`: one that transformers knows, or "auto": variable-length
    flash attention on a GPU that has it, else transformers' own choice. ValueError, in one line, if it cannot run."""
    check_model(model)
    gpu = torch.cuda.is_available()
    if name == "auto" and not (gpu and is_flash_attn_2_available()):
        return
    try:
        model.set_attn_implementation("flash_attention_2" if name == "auto" else name)
        if model.device.type == "cuda" or not gpu:  # on its way to a GPU it cannot run yet
            check_model(model)
    except (ImportError, RuntimeError, ValueError) as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"--attention {name} does not work here ({what}); leave it out, or say sdpa") from error


def load_model(path: str, gradient_checkpointing=False, attention="auto", device: str | None = None):
    """Model in float32 (bf16 weights do not move at lr 1e-6), tokenizer, and the ids that end an answer. On the GPU if
    there is one, but for several ranks on the CPU: sharding takes it from there layer by layer, as it need not fit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # transformers raises half a dozen kinds here, some with pages of text
        first = str(error).strip().split("\n")[0]
        what = f"no model can be loaded from {path!r} ({type(error).__name__}: {first})"
        raise ValueError(f"{what}; give a Hugging Face id, or a folder with config, weights and tokenizer") from error
    stop = model.generation_config.eos_token_id
    stop = set(stop if isinstance(stop, list) else [stop]) | {tokenizer.eos_token_id}
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = model.to(device or ("cuda" if torch.cuda.is_available() and ranks.world() == 1 else "cpu")).eval()
    without_dropout(model)
    choose_attention(model, attention)
    return model, tokenizer, sorted(stop - {None})


def without_dropout(model) -> None:
    """The policy that is trained has to be the one that sampled; dropout would make it another at every pass."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


class LogProbModel(torch.nn.Module):
    """A model whose forward is `model_logprobs`: the root that FSDP needs, to have the head's weight at hand."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def pack(self, sequences: list[Sequence], tokens: int) -> list[MicroBatch]:
        device = next(self.parameters()).device
        return pack(sequences, tokens, tokens if has_varlen(self.model) else None, device)

    def forward(self, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        return model_logprobs(self.model, batch, temperature)


def autocast(model: torch.nn.Module, dtype: torch.dtype) -> torch.autocast:
    """Computation in bf16, if that is the `dtype`; over several ranks FSDP's own mixed precision is in charge."""
    on = dtype == torch.bfloat16 and ranks.world() == 1
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=on)


def share_out(sequences: list[Sequence], rank: int, world: int) -> list[int]:
    """Numbers of the sequences that `rank` trains on: dealt out longest first, there and back, to even out tokens."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    turns = (rank, 2 * world - 1 - rank)
    return [i for place, i in enumerate(order) if place % (2 * world) in turns]


def empty_microbatch(device) -> MicroBatch:
    """One token that nothing looks at: keeps a rank in step with others that have more to do."""
    one, none = torch.zeros(1, 1, dtype=torch.long, device=device), torch.zeros(0, dtype=torch.long, device=device)
    return MicroBatch(one, one, none, none, none, [])
