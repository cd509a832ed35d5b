"""Engines: prompts in as token ids, answers out as token ids with the log-probs they were sampled with.

    generate(prompts, n, seed, step) -> list[Group]    n answers to each prompt from the current policy
    sleep()                       before the update, if it `sleeps`: gives up memory that the trainer can use
    sync(model) -> float          after it: takes the new weights, and returns how far the engine is off

Every answer has a random stream of its own, from (seed, step, prompt, sample). So the noise of an answer depends
neither on the batch it was sampled in nor on the rank that sampled it. Sampling is at a temperature and nothing
else: with top-p or top-k the log-probs would be those of another distribution.
"""

import copy
import hashlib

import torch

from grpo import Answer, Policy
from replay import Group
from support import decode, ranks, vllm_quirks
from support.model import check_context, load_model
from support.vllm_quirks import choose_engine
from tasks.data import Prompt


class EngineAstray(RuntimeError):
    """The engine's weights are not the trainer's."""


def request_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """A 63-bit seed for one answer, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {step} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_groups(prompts: list[Prompt], n: int, step: int, tokens, logprobs, truncated) -> list[Group]:
    """Groups born at `step`, without rewards, from lists that hold `n` answers to each prompt in turn."""
    groups = []
    for i, prompt in enumerate(prompts):
        mine = slice(i * n, (i + 1) * n)
        groups.append(Group(prompt.index, tokens[mine], logprobs[mine], truncated[mine], step))
    return groups


class TransformersEngine:
    """Samples from the trainer's own weights, on any machine. Over several ranks those are in shards, and
    `model` is a whole copy that belongs to the engine."""

    name = "transformers"
    sleeps = False

    def __init__(self, model, stop_ids, max_tokens, temperature=1.0, batch_size=512, dtype="float32"):
        self.model = model
        self.stop = torch.tensor(sorted(stop_ids), device=model.device)
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.batch_size = batch_size  # answers decoded side by side; bounds the KV cache
        # The update computes in the same dtype, so that both see the same log-probs.
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def generate(self, prompts: list[Prompt], n, seed, step, temperature=None) -> list[Group]:
        """`n` answers to each prompt, as groups born at `step`, without rewards."""
        if temperature is None:
            temperature = self.temperature
        at_once = max(self.batch_size // n, 1)
        groups: list[Group] = []
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            ids = [prompt.ids for prompt in part]
            seeds = [request_seed(seed, step, prompt.index, i) for prompt in part for i in range(n)]
            with self.autocast:
                tokens, logprobs, truncated = decode.sample_answers(
                    self.model, ids, n, seeds, self.stop, self.max_tokens, temperature
                )
            groups += make_groups(part, n, step, tokens, logprobs, truncated)
        return groups

    def sleep(self) -> None:
        """There is nothing to give up, and nothing to close: the KV cache went with the last batch."""

    close = sleep

    @torch.no_grad()
    def sync(self, model=None) -> float:
        """Copies the trainer's weights, where the engine has its own. Every rank has to call it."""
        if ranks.WORLD > 1:
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(ranks.whole(theirs))
        return 0.0


# The answers that a sync compares, and the most tokens of each.
PROBES = 8
PROBE_TOKENS = 16
# Differences of log-probs that rounding explains. Up to 2e-5 was seen in float32 (TF32 on a GPU should give
# some 0.02), 0.45 in bfloat16. In bfloat16 one update that was missed at lr 1e-6 or 1e-5 is smaller than rounding,
# in the largest difference and in the mean alike. But then the engine has stood still, to the bit, and the trainer
# has not. An update of which a part was missed is found in float32 only.
SYNC_BOUND = {torch.float32: 0.05, torch.bfloat16: 1.0}
STILL = 0.25  # share of the trainer's log-probs that have changed: so many do not for no reason


class VLLMEngine:
    """Samples with vLLM in the trainer's process, on a GPU or a CPU. Without a model it reads the weights at `path`;
    with one, it has none until the first sync.

    It leaves a default process group behind. There may be one engine at a time: when one is collected as garbage,
    vLLM destroys the process groups of all.
    """

    name = "vllm"

    def __init__(self, model, path: str, stop_ids, cfg):
        options = vllm_quirks.vllm_options(cfg)
        self.temperature = cfg.temperature
        self.max_tokens = cfg.max_tokens
        self.dtype = getattr(torch, cfg.dtype)
        self.sleeps = torch.cuda.is_available() and options.get("enable_sleep_mode", True)
        self.asleep = False
        self.before = None  # log-probs of the last sync, the engine's and the trainer's
        self.peers = vllm_quirks.Peers(options.get("tensor_parallel_size", 1))
        settings = {
            "model": path,
            "dtype": cfg.dtype,
            "max_model_len": cfg.max_prompt_tokens + cfg.max_tokens,
            "max_num_seqs": cfg.rollout_batch,
            "load_format": "auto" if model is None else "dummy",  # random, until the first sync
            "skip_tokenizer_init": True,  # token ids in and out
            "logprobs_mode": "processed_logprobs",  # of what was sampled from, at its temperature
            "enable_prefix_caching": True,  # the answers of a group share its prompt
        }
        # The user's own settings come last, but that a CPU cannot sleep stays so.
        settings |= vllm_quirks.machine_settings(model, cfg, self.sleeps)
        settings |= options | {"enable_sleep_mode": self.sleeps}
        vllm_quirks.prepare()
        with vllm_quirks.trainer_untouched():
            import vllm

            self.llm = vllm.LLM(**settings)
        # These ids end an answer, and no others. Log-probs: of the sampled token alone.
        self.sampling = {"stop_token_ids": sorted(stop_ids), "ignore_eos": True}
        self.sampling |= {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
        if model is not None:
            self.probes = make_probes(model.config.get_text_config().vocab_size)

    def generate(self, prompts: list[Prompt], n, seed, step, temperature=None, limit=0) -> list[Group]:
        """`n` answers to each prompt, as groups born at `step`, without rewards. limit: most tokens of an answer, if
        not `max_tokens`. RuntimeError if the engine is asleep."""
        if self.asleep:
            raise RuntimeError("the engine is asleep and would wait for ever: call sync first")
        from vllm import SamplingParams

        if temperature is None:
            temperature = self.temperature
        # Ranks that share an engine answer the prompts of all of them together, and keep what is their own.
        prompts, own = self.peers.collect(prompts)

        # One request a prompt: vLLM gives its i-th answer the request's seed + i. Greedy: all n answers are
        # equal, and vLLM returns one.
        copies = n if temperature == 0 else 1
        how = self.sampling | {"n": n // copies, "temperature": temperature}
        how["max_tokens"] = limit or self.max_tokens
        asked = []
        params = []
        for prompt in prompts:
            asked.append({"prompt_token_ids": list(prompt.ids)})
            params.append(SamplingParams(seed=request_seed(seed, step, prompt.index, 0), **how))
        with vllm_quirks.trainer_untouched():
            requests = self.llm.generate(asked, params, use_tqdm=False)

        # From vLLM's records to tensors, all answers in turn.
        answers = []
        for request in requests:
            answers += request.outputs * copies
        tokens = [torch.tensor(answer.token_ids, dtype=torch.int32) for answer in answers]
        logprobs = [torch.tensor(answer.logprobs.logprobs, dtype=torch.float32) for answer in answers]
        truncated = [answer.finish_reason != "stop" for answer in answers]
        return make_groups(prompts, n, step, tokens, logprobs, truncated)[own]

    def sleep(self) -> None:
        """Frees the KV cache, and the weights too: `sync` brings all of them anyway."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """Has to be called before the process group goes, which vLLM takes apart as well."""
        self.llm.llm_engine.engine_core.shutdown()

    def sync(self, model) -> float:
        """Wakes up with the weights of `model`. Returns the largest difference between the engine's log-probs and
        the trainer's over a few answers; EngineAstray if it is more than rounding can explain, or if the engine has
        stood still."""
        if not isinstance(model, Policy):
            model = Policy(model, str(self.dtype).removeprefix("torch."))

        # The KV cache wakes last, into the room that the push no longer needs. Memory that PyTorch has cached
        # is given back first, because vLLM cannot use it.
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self._push(model)
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

        # A prompt in the prefix cache was read with the old weights.
        if not self.llm.reset_prefix_cache():
            raise EngineAstray("vLLM did not drop its prefix cache, made with the old weights")
        engine, trainer = self._probe(model)
        error = (engine - trainer).abs().max().item()
        bound = SYNC_BOUND[self.dtype]
        wrong = ""
        if not error <= bound:  # NaN too
            wrong = f"log-probs of the same tokens differ by {error:.3g} (rounding: at most {bound:g})"
        elif self.before and stood_still(*self.before, engine, trainer):
            wrong = "its log-probs are what they were before, and the trainer's have changed"
        if wrong:
            raise EngineAstray(
                f"vLLM does not follow the trainer: after a sync {wrong}; use another vLLM, or --engine transformers"
            )
        self.before = engine, trainer
        return error

    def _push(self, model: Policy) -> None:
        """By the worker's own loader, which knows names, fused layers and shards, and leaves tensors where
        CUDA graphs look for them. Without an iterator it would silently read the disk once more."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights(model)})
        self.llm.apply_model(vllm_quirks.repack_tied_head)

    def _weights(self, model: Policy):
        """Yields (name, weight in the engine's dtype) one at a time. Nothing here keeps a weight, and vLLM
        lets go of it once its layer is complete: there is never a second full copy."""
        for name, weight in model.model.named_parameters():
            yield name, ranks.whole(weight.detach().to(self.dtype))

    @torch.no_grad()
    def _probe(self, model: Policy) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the engine and of the trainer, over answers to fixed prompts with fixed seeds. Not over fixed
        answers: they grow unlikely as the policy changes, and rounding weighs three times as much on unlikely tokens.
        """
        limit = min(PROBE_TOKENS, self.max_tokens)
        groups = self.generate(self.probes, n=1, seed=0, step=0, temperature=1.0, limit=limit)
        pairs = zip(self.probes, groups, strict=True)
        answers = [Answer(probe.ids, group.tokens[0], group.logprobs[0], 0.0, 0) for probe, group in pairs]
        (batch,) = model.pack(answers, 2 * PROBES * PROBE_TOKENS)
        logprobs, _ = model(batch, 1.0)
        engine = torch.cat([answers[i].behaviour for i in batch.sequences]).to(logprobs.device)
        return engine, logprobs


def stood_still(engine_before, trainer_before, engine, trainer) -> bool:
    """Whether the engine's log-probs are to the bit what they were at the sync before, and the trainer's are not."""
    return torch.equal(engine, engine_before) and (trainer != trainer_before).float().mean().item() > STILL


def make_probes(vocabulary: int) -> list[Prompt]:
    """The prompts of four tokens that a sync asks. Their ids come from the lower half of the vocabulary:
    the upper end may be padding, which no tokenizer knows and no training has touched."""
    probes = []
    for i in range(PROBES):
        ids = [(4 * i + j) % (vocabulary // 2) for j in range(4)]
        probes.append(Prompt(i, "", "", tuple(ids)))
    return probes


def make_engine(kind: str, model, model_path: str, stop_ids, cfg) -> TransformersEngine | VLLMEngine:
    """The engine named `kind`, or with "auto" the one for this machine; prints which and why. Its weights
    are those of `model`, or where that is None of `model_path`. ValueError, in one line, if it cannot run."""
    kind, why = choose_engine(kind)
    check_context(model, model_path, cfg)
    if kind == "vllm":
        vllm_quirks.check_options(cfg)
    if ranks.is_main():
        print(f"engine: {kind} ({why})")

    if kind == "transformers":
        if model is None:
            model, _, _ = load_model(model_path)
        elif ranks.WORLD > 1:
            model = copy.deepcopy(model)  # the trainer's weights will be in shards, which cannot generate
        if ranks.WORLD > 1 and torch.cuda.is_available():
            model = model.to("cuda")
        settings = (cfg.max_tokens, cfg.temperature, cfg.rollout_batch, cfg.dtype)
        return TransformersEngine(model, stop_ids, *settings)
    try:
        return VLLMEngine(model, model_path, stop_ids, cfg)
    except (ImportError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"vLLM cannot run {model_path}: {vllm_quirks.explain(error)}") from error
