"""Engines: prompts in as token ids, answers out as token ids with the log-probs they were sampled with.

    generate(prompts, n, seed, step) -> list[Group]    n answers to each prompt from the current policy
    sleep()                                            before the update: give up memory that the trainer can use
    sync(model) -> float                               after it: the new weights; how far the engine is off

Every answer has a random stream of its own, from (seed, step, prompt, sample): runs repeat, an answer depends neither
on the batch it was sampled in nor on the rank that sampled it, and evaluations share their noise from step to step.
Sampling is at a temperature and nothing else: with top-p or top-k the log-probs would be those of another distribution.
"""

import contextlib
import copy
import hashlib
import importlib.util
import os
import random

import numpy as np
import torch
import torch.distributed as dist

from grpo import Answer as Sequence
from grpo import Policy as LogProbModel
from replay import Group
from support import ranks
from support.model import load_model
from tasks.data import Prompt


def request_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """A 63-bit seed for one answer, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {step} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row by inverting the cumulative distribution.

    logits: [B, V], noise: [B] uniform in [0, 1) -> token [B] and its log-prob [B] in float32, under
    softmax(logits / temperature); temperature 0 is greedy, with log-probs at temperature 1.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        # scaled by the total, which rounding leaves a little off 1: noise near 1 must not fall past the last token
        token = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(1, token[:, None])[:, 0]


def make_groups(prompts: list[Prompt], n: int, step: int, tokens: list, logprobs: list, truncated: list) -> list[Group]:
    """Groups born at `step`, without rewards, of `n` answers to each prompt in turn."""
    rows = [slice(i * n, (i + 1) * n) for i in range(len(prompts))]
    return [Group(p.index, tokens[r], logprobs[r], truncated[r], step) for p, r in zip(prompts, rows, strict=True)]


class TransformersEngine:
    """Batched sampling with a KV cache, from the trainer's own weights where it is the only rank; runs anywhere."""

    name = "transformers"

    def __init__(self, model, stop_ids, max_tokens: int, temperature=1.0, batch_size=512, dtype="float32"):
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.stop = torch.tensor(sorted(stop_ids), device=model.device)
        self.batch_size = batch_size  # answers decoded side by side; bounds the KV cache
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def sleep(self) -> None:
        """Nothing to give up: the KV cache went with the last batch."""

    close = sleep

    @torch.no_grad()
    def sync(self, model=None) -> float:
        """With several ranks the trainer's weights are in shards, and the engine has whole ones of its own."""
        if ranks.world() > 1:
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(ranks.whole(theirs))
        return 0.0

    def generate(self, prompts: list[Prompt], n: int, seed: int, step: int, temperature=None) -> list[Group]:
        """`n` answers to each prompt, as groups born at `step`, without rewards."""
        temperature = self.temperature if temperature is None else temperature
        at_once = max(self.batch_size // n, 1)
        groups: list[Group] = []
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            seeds = [request_seed(seed, step, prompt.index, i) for prompt in part for i in range(n)]
            with torch.inference_mode(), self.autocast:  # as in the update, so that both see the same log-probs
                tokens, logprobs, ends, finished = self._decode([p.ids for p in part], n, seeds, temperature)
            tokens, logprobs = ([row[:n].clone() for row, n in zip(x, ends, strict=True)] for x in (tokens, logprobs))
            groups += make_groups(part, n, step, tokens, logprobs, [not done for done in finished])
        return groups

    def _decode(self, prompts: list[tuple[int, ...]], n: int, seeds: list[int], temperature: float):
        """Tokens and log-probs, [B, T] on the CPU with rubbish after each answer's end, lengths [B], finished [B]."""
        device = self.model.device
        size, longest = len(prompts) * n, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)  # [P, T], padded left
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        positions = (torch.arange(longest, device=device) - (longest - lengths)[:, None]).clamp(min=0)
        mask = None
        if int(lengths.min()) < longest:
            mask = (torch.arange(longest, device=device) >= (longest - lengths)[:, None]).long()
        noise = np.stack([np.random.Generator(np.random.SFC64(s)).random(self.max_tokens, np.float32) for s in seeds])
        noise = torch.from_numpy(noise).to(device)  # [B, T]
        tokens = torch.zeros(size, self.max_tokens, dtype=torch.int32)
        logprobs = torch.zeros(size, self.max_tokens)
        ends = torch.full((size,), self.max_tokens)
        finished = torch.zeros(size, dtype=torch.bool)

        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache, logits, position = out.past_key_values, out.logits[:, -1], lengths
        # The running batch holds each distinct prefix once: at first the prompts, and answers part where they differ.
        alive = torch.arange(size)  # answers still being written
        row = torch.arange(len(prompts), device=device).repeat_interleave(n)  # the row that each of them continues
        for t in range(self.max_tokens):
            token, logprob = sample(logits[row], noise[alive, t], temperature)
            tokens[alive, t], logprobs[alive, t] = token.int().cpu(), logprob.cpu()
            stopped = torch.isin(token, self.stop)
            ends[alive[stopped.cpu()]] = t + 1
            finished[alive[stopped.cpu()]] = True
            alive = alive[~stopped.cpu()]
            if t + 1 == self.max_tokens or not len(alive):
                break
            vocabulary = logits.shape[-1]
            prefix, row = torch.unique(row[~stopped] * vocabulary + token[~stopped], return_inverse=True)
            parent, token = prefix // vocabulary, prefix % vocabulary
            if len(parent) != len(logits) or bool((parent[1:] == parent[:-1]).any()):
                cache.batch_select_indices(parent)
                position, mask = position[parent], None if mask is None else mask[parent]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self.model(
                input_ids=token[:, None], attention_mask=mask, position_ids=position[:, None],
                past_key_values=cache, use_cache=True,
            ).logits[:, -1]  # fmt: skip
            position = position + 1
        return tokens, logprobs, ends.tolist(), finished.tolist()


class EngineAstray(RuntimeError): ...  # its weights are not the trainer's


PROBES, PROBE_TOKENS = 8, 16  # answers that `sync` compares, and their length
# Differences of log-probs that rounding explains: up to 2e-5 was seen in float32 (TF32 on a GPU should give some 0.02),
# 0.45 in bfloat16. An engine that missed one update of the embedded model is off by 0.6, two by 1.2.
SYNC_BOUND = {torch.float32: 0.05, torch.bfloat16: 1.0}


class VLLMEngine:
    """vLLM in the trainer's process, on a GPU or a CPU. Without a model its weights stay those of `path`.

    Leaves a default process group behind. One engine at a time: when one is garbage-collected, vLLM destroys the
    process groups of all.
    """

    name = "vllm"

    def __init__(self, model, path: str, stop_ids, cfg):
        cuda = torch.cuda.is_available()
        self.temperature, self.max_tokens, self.dtype = cfg.temperature, cfg.max_tokens, getattr(torch, cfg.dtype)
        self.sleeps, self.asleep = cuda and not False, False  # vLLM on a CPU does not know how to
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}  # before the import
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "0" if cuda else "1")  # on a CPU it needs a C++ compiler
        self.peers = dist.new_subgroups(1)[0] if 1 > 1 else None
        parallel = {"tensor_parallel_size": 1, "distributed_executor_backend": "external_launcher"}
        with trainer_untouched():
            import vllm

            self.llm = vllm.LLM(
                model=path, dtype=cfg.dtype, gpu_memory_utilization=cfg.gpu_memory, max_num_seqs=cfg.rollout_batch,
                kv_cache_memory_bytes= (None if cuda else 2**28),
                max_model_len=cfg.max_prompt_tokens + cfg.max_tokens,
                load_format="auto" if model is None else "dummy",  # a weight that no push reaches is missed at once
                skip_tokenizer_init=True,  # token ids in and out
                enable_prefix_caching=True,  # the answers of a group share its prompt
                enable_chunked_prefill=cuda,  # on a CPU a seeded prompt cannot be split
                logprobs_mode="processed_logprobs",  # of the distribution sampled from, at its temperature
                enable_sleep_mode=self.sleeps, enforce_eager= not cuda, use_tqdm_on_load=False,
                **(parallel if ranks.world() > 1 else {}),
            )  # fmt: skip
        self.sampling = {"logprobs": 0, "flat_logprobs": True, "detokenize": False}  # 0: of the sampled token alone
        self.sampling |= {"stop_token_ids": sorted(stop_ids), "ignore_eos": True}  # these end an answer, and no others
        if model is not None:
            # ids of the lower half: the upper end may be padding, which no tokenizer knows and no training touched
            half = model.config.get_text_config().vocab_size // 2
            self.probes = [Prompt(i, "", "", tuple((4 * i + j) % half for j in range(4))) for i in range(PROBES)]
            self.sync(model)

    def generate(self, prompts: list[Prompt], n: int, seed: int, step: int, temperature=None, limit=0) -> list[Group]:
        """`n` answers to each prompt, as groups born at `step`, without rewards. limit: other than `max_tokens`."""
        if self.asleep:
            raise RuntimeError("the engine is asleep and would wait for ever: call sync first")
        from vllm import SamplingParams

        temperature, parts, place = self.temperature if temperature is None else temperature, [prompts], 0
        if self.peers:  # ranks that share an engine ask for the prompts of all of them, and keep what answers their own
            parts, place = [None] * self.peers.size(), self.peers.rank()
            dist.all_gather_object(parts, prompts, self.peers)
        first, own, prompts = sum(map(len, parts[:place])), len(prompts), sum(parts, [])
        asked = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
        alike = temperature == 0  # one answer stands for all, and vLLM gives no more
        how = self.sampling | {"temperature": temperature, "max_tokens": limit or self.max_tokens}
        # vLLM gives the i-th answer to a request the request's seed + i; they share its prompt in the prefix cache
        seeds = [request_seed(seed, step, prompt.index, 0) for prompt in prompts]
        params = [SamplingParams(n=1 if alike else n, seed=s, **how) for s in seeds]
        with trainer_untouched():
            requests = self.llm.generate(asked, params, use_tqdm=False)
        answers = [answer for request in requests for answer in request.outputs * (n if alike else 1)]
        tokens = [torch.tensor(answer.token_ids, dtype=torch.int32) for answer in answers]
        logprobs = [torch.tensor(answer.logprobs.logprobs, dtype=torch.float32) for answer in answers]
        truncated = [answer.finish_reason != "stop" for answer in answers]
        return make_groups(prompts, n, step, tokens, logprobs, truncated)[first : first + own]

    def close(self) -> None:
        """To be called before the process group goes, which vLLM takes apart as well."""
        self.llm.llm_engine.engine_core.shutdown()

    def sleep(self) -> None:
        """Frees the KV cache, and the weights too: `sync` brings all of them anyway."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self, model) -> float:
        """Pushes the weights of `model`. Returns the largest difference between the log-probs of the engine and of the
        trainer over a few answers; RuntimeError if it is more than rounding can explain."""
        model = model if isinstance(model, LogProbModel) else LogProbModel(model)
        if self.asleep:
            torch.cuda.empty_cache()  # what PyTorch hoards, vLLM cannot allocate
            self.llm.wake_up(tags=["weights"])
        self._push(model)
        if self.asleep:
            torch.cuda.empty_cache()  # the KV cache comes last, into the room that the push no longer needs
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():  # else prompts would be read with the old weights
            raise EngineAstray("vLLM did not drop its prefix cache, which holds activations of the old weights")
        error = self._difference(model)
        if not error <= SYNC_BOUND[self.dtype]:  # NaN too
            raise EngineAstray(
                f"vLLM does not follow the trainer: after a sync, log-probs of the same tokens differ by {error:.3g} "
                f"(rounding: at most {SYNC_BOUND[self.dtype]:g}); use another version of vLLM, or --engine transformers"
            )
        return error

    def _push(self, model: LogProbModel) -> None:
        """By the worker's own loader, which knows names, fused layers and shards, and leaves tensors where CUDA graphs
        look for them. Never without an iterator: then it silently reads the checkpoint on disk once more."""
        weights = ((n, ranks.whole(weight.detach()).to(self.dtype)) for n, weight in model.model.named_parameters())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(_repack_tied_head)

    @torch.no_grad()
    def _difference(self, model: LogProbModel) -> float:
        """Over answers to fixed prompts with fixed seeds. Not over fixed answers: they grow unlikely as the policy
        changes, and rounding weighs three times as much on unlikely tokens."""
        groups = self.generate(self.probes, 1, 0, 0, temperature=1.0, limit=min(PROBE_TOKENS, self.max_tokens))
        pairs = zip(self.probes, groups, strict=True)
        answers = [Sequence(probe.ids, group.tokens[0], group.logprobs[0], 0.0, 0) for probe, group in pairs]
        (batch,) = model.pack(answers, 2 * PROBES * PROBE_TOKENS)
        logprobs, _ = model(batch, 1.0)
        engine = torch.cat([answers[i].behaviour for i in batch.sequences]).to(logprobs.device)
        return (engine - logprobs).abs().max().item()


def _repack_tied_head(model) -> None:
    """On a CPU vLLM computes with packed copies of the weights. A reload renews them all but that of an output layer
    tied to the embedding, which would go on with the old weights."""
    head, embedding = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
    if hasattr(head, "cpu_linear") and embedding is not None and head.weight is embedding.weight:
        head.quant_method.process_weights_after_loading(head)


@contextlib.contextmanager
def trainer_untouched():
    """vLLM reseeds and draws from the global generators of this process, turns `torch.set_num_threads` off, and on a
    CPU sets variables that child processes would inherit: all of it is put back."""
    python, numpy, set_num_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    variables = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_num_threads
        for name, value in variables.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def make_engine(kind: str, model, model_path: str, stop_ids, cfg) -> TransformersEngine | VLLMEngine:
    """The engine named `kind`, or with "auto" the one for this machine; prints which and why. Its weights are those of
    `model`, or where that is None of `model_path`. ValueError, in one line, if it cannot run."""
    from transformers import AutoConfig

    gpu, installed, why = torch.cuda.is_available(), importlib.util.find_spec("vllm") is not None, "asked for"
    if kind == "auto":
        kind = "vllm" if gpu and installed else "transformers"
        why = "no CUDA GPU here" if not gpu else "CUDA GPU and vLLM are here" if installed else "vLLM is not installed"
    if kind == "vllm" and not installed:
        raise ValueError("vLLM is not installed: pip install -r requirements.txt, or use --engine transformers")
    if kind == "vllm" and ranks.world() % 1:
        raise ValueError(f"--tensor-parallel {1} needs a multiple of so many ranks: see torchrun")
    config = (AutoConfig.from_pretrained(model_path) if model is None else model.config).get_text_config()
    context, wanted = getattr(config, "max_position_embeddings", None), cfg.max_prompt_tokens + cfg.max_tokens
    if context and wanted > context:
        raise ValueError(
            f"{model_path} has a context of {context}, but prompt and answer may take {wanted}; lower --max-tokens, "
            "or in training --max-prompt-tokens"
        )
    if ranks.is_main():
        print(f"engine: {kind} ({why})")
    if kind == "transformers":
        if model is None or ranks.world() > 1:  # sharded weights cannot generate
            model = (load_model(model_path)[0] if model is None else copy.deepcopy(model)).to("cuda" if gpu else "cpu")
        return TransformersEngine(model, stop_ids, cfg.max_tokens, cfg.temperature, cfg.rollout_batch, cfg.dtype)
    try:
        return VLLMEngine(model, model_path, stop_ids, cfg)
    except (ImportError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"vLLM cannot run {model_path}: {' '.join(str(error).split())[:400]} ({type(error).__name__}); if memory "
            "is short, change --kv-cache-gb or --gpu-memory; else use --engine transformers"
        ) from error
