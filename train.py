"""GRPO with replay: sample answers, score them 0 or 1, push towards the better, and spend rollouts where they teach.

    python train.py --replay                               the embedded model and task, on a CPU, in minutes
    python train.py --model Qwen/Qwen3-8B --replay         the real thing
    python train.py --model PATH --data FILE.jsonl         your model, your problems

One step, in `train` below, and where each part stands:

    1. replay.py draws prompts, rollout.py samples answers, reward.py scores them.
    2. replay.py completes the batch: stored groups in place of dead ones, stored answers on top.
    3. grpo.py updates the policy, and the engine gets the new weights.
    4. The step is logged; now and then the policy is evaluated and the run is saved.
"""

import copy
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal

from support import config
from tasks import tiny


@dataclass(frozen=True)
class Method:
    """What `--replay NAME` stands for: its paper, its rules as "module:Class", joined by +, and what else it sets."""

    about: str
    rules: str
    settings: dict = field(default_factory=dict)


DAPO = {"clip_high": 0.28, "advantage": "std"}
POPO = DAPO | {"dual_clip": 10.0}
METHODS = {
    "prompt": Method("Prompt Replay, 2603.21177", "replay:PromptReplay", {"mask_truncated": True}),
    "prioritized": Method("Prioritized Replay, 2601.02648", "replay:Prioritized", {"clip_high": 0.2}),
    "rollout": Method("rollout-level replay, 2606.04560", "replay:RolloutReplay", POPO | {"proximal": "birth"}),
    "group": Method("POPO, 2606.01281", "replay:GroupReplay", POPO),
    "group-kl": Method("POPO, least drift first", "lab.rules:LeastDriftGroupReplay", POPO),
    "group-oldest": Method("POPO, oldest first", "lab.rules:OldestGroupReplay", POPO),
    "dapo": Method("dynamic sampling, 2503.14476, a baseline", "replay:DynamicSampling", DAPO),
    "greso": Method("GRESO, 2506.02177, a baseline", "lab.rules:GRESO"),
    "beta": Method("Beta posteriors (MoPPS), 2507.04632, a baseline", "lab.rules:Beta"),
    "continual": Method("Continual Prompt Replay, 2608.18574", "lab.continual:ContinualReplay", {"share": 0.25}),
    "adaptive": Method("our own", "lab.rules:Adaptive+lab.rules:OnPolicyGroupReplay", {"share": 0.5, "cooldown": 10}),
}
METHODS["popo"] = METHODS["group"]


@dataclass
class Config:
    """Every knob. A setting comes from, in rising order: the defaults here, mostly those of Prompt Replay's paper;
    with the embedded model tiny.SETTINGS; the method's settings; the command line. Comments are the flags' help."""

    # ---- model and data
    model: str = ""  # Hugging Face id or folder; without it the embedded model is made and trained
    data: str = ""  # polaris (default), dolci, dapo, gsm8k, math; OWNER/NAME of the hub; or a file
    task: str = ""  # instead of data: path/to/task.py with rows() and score(responses, golds); or gym:NAME
    then: tuple[str, ...] = ()  # further tasks, trained one after another behind --task by --replay continual
    data_options: str = ""  # for the hub, as JSON: '{"name": "main", "split": "test", "revision": "HASH"}'
    problem_column: str | None = None  # column of the problem; found if it has a usual name
    answer_column: str | None = None  # column of the gold answer; found if it has a usual name
    difficulty: tuple[float, float] = (0.0, 1.0)  # pass rates to keep, by the column `difficulty`
    sharing: Literal["digits", "columns", "none"] = "digits"  # embedded task: what prompts share
    keep_overlap: bool = False  # do not look for benchmark problems in data of the hub
    thinking: Literal["auto", "on", "off"] = "auto"  # enable_thinking of the template
    max_prompts: int = 0  # train on the first so many prompts only; 0: all
    reward: str = "math"  # math, equation, gym, random, always, format; or path/to/file.py:function
    partial_credit: bool = False  # gym: the reward is the score, else 1 from 0.99 on and 0 below
    judge: str = ""  # of held-out answers, named as a reward; default: the task's own verifier
    instruction: str = "auto"  # behind each problem; auto: to reason and to box the answer; none; a text
    # ---- run
    out: str = ""  # folder of the run; default: a new one under out/
    seed: int = 0  # of prompt order, sampling and replay
    steps: int = 500  # steps to train for
    max_rollouts: int = 0  # end once so many answers have been generated; 0: after --steps
    resume: bool = False  # go on from the newest checkpoint in --out, as if never stopped
    save_every: int = 20  # steps between checkpoints
    eval_every: int = 20  # steps between evaluations on held-out prompts; 0: never
    eval_prompts: int = 200  # held-out prompts (at most a tenth of the data)
    eval_samples: int = 1  # answers to each of them
    threads: int = 0  # CPU threads; 0: PyTorch's choice
    dry_run: bool = False  # print configuration, first prompt and memory plan, and end
    gpus: str = ""  # with --dry-run: GPUs to plan for, as 8x80 for 8 of 80 GB
    wandb: str = ""  # project of Weights & Biases to mirror metrics and samples in
    tensorboard: bool = False  # mirror metrics and samples in tensorboard/ of the folder
    # ---- replay
    replay: str = "none"  # a method as listed above, file.py:Class, or some with +; alone: prompt
    band: tuple[float, float] = (0.25, 0.75)  # prompt: pass rates that may come back, ends included
    share: float = 0.75  # prompt, adaptive, continual: largest share of a batch that may come back
    cooldown: int = 10  # prompt, adaptive: least steps between two uses of a prompt
    max_reuse: int = 15  # prompt: most times a prompt comes back
    smoothing: float = 0.8  # prioritized: weight of the newest pass rate
    initial_priority: float = 0.2  # prioritized: p(1-p) ascribed to prompts never seen
    explore: float = 0.125  # prioritized: chance that a whole batch is drawn at random
    retest_every: int = 10  # prioritized: steps between retests of the pools; 0: none
    retest_solved: float = 0.25  # prioritized: share of a retest that goes to solved prompts
    max_rounds: int = 10  # dapo: most generation rounds a step
    group_capacity: int = 0  # group, adaptive: groups stored; 0: two steps' worth
    replay_ratio: float = 0.5  # rollout: stored answers added, per fresh useful one
    priority_exponent: float = 0.5  # rollout: exponent of |advantage| when drawing
    max_age: int = 10  # rollout: most steps since birth
    replay_warmup: int = 20  # rollout: first steps, without replay
    rollout_capacity: int = 30_000  # rollout: answers stored
    # ---- rollout
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM on a GPU that has it
    prompts_per_step: int = 32  # prompts that a step draws, P
    answers_per_prompt: int = 16  # answers to each of them, G
    max_prompt_tokens: int = 1024  # longer prompts are left out and counted
    max_tokens: int = 7168  # of an answer
    temperature: float = 1.0  # of sampling; log-probs are taken at the same
    rollout_batch: int = 512  # answers decoded side by side
    gpu_memory: float = 0.0  # vLLM: its share of the GPU; 0: all that the trainer leaves
    vllm: str = ""  # vLLM: more of its own settings, as JSON: '{"enforce_eager": true}'
    # ---- objective
    advantage: Literal["centred", "std", "rloo"] = "centred"  # of a group's rewards
    loss: Literal["clip", "cispo"] = "clip"  # PPO's objective, or CISPO's
    ratio: Literal["token", "sequence"] = "token"  # sequence is GSPO's
    normaliser: Literal["token", "sequence", "constant"] = "token"  # DAPO's, GRPO's, Dr. GRPO's
    proximal: Literal["old", "birth"] = "old"  # clip around pi_old, or the birth policy
    clip_low: float = 0.2  # ratio may fall by this
    clip_high: float = 0.272  # ratio may rise by this
    dual_clip: float = 0.0  # wrong answers: the term is at least this times A; 0: no bound
    is_cap: float = 2.0  # truncation of importance weights; inf: none; 0: no weights
    kl: float = 0.0  # coefficient of a k3 KL to the initial model
    mask_truncated: bool = False  # do not train on answers cut at the limit
    # ---- optimiser
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # 8 bits: pip install torchao
    lr: float = 1e-6  # constant
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's; 0.999 spans more steps than most runs have
    weight_decay: float = 0.0  # AdamW's
    grad_clip: float = 1.0  # largest gradient norm
    minibatches: int = 1  # optimiser steps per pass over the batch
    epochs: int = 1  # passes over the batch
    tokens_per_microbatch: int = 8192  # bounds the update's memory; a sequence is never divided
    offload: Literal["auto", "on", "off"] = "auto"  # float32 weights and AdamW on the host
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of computation; weights stay float32
    gradient_checkpointing: bool = True  # a tenth of the activations' memory, for a third more time


# what may differ between a run and its resumption
FREE = {"out", "steps", "max_rollouts", "resume", "save_every", "eval_every", "rollout_batch", "gpu_memory", "vllm"}
FREE |= {"offload", "dry_run", "gpus", "wandb", "tensorboard"}

# Flags are read before what takes seconds to import: --help and mistakes need not wait for it.
if __name__ == "__main__":
    config.settings(sys.argv[1:], Config, METHODS, tiny.SETTINGS, __doc__)

import torch

import grpo
import reward
import rollout
from replay import DynamicSampling, Group, Uniform
from support import checkpoint, folder, limits, log, offload, plan, ranks
from support.model import check_policy, load_model, make_optimizer, use_varlen_attention
from tasks import data, prompts

# ---------------------------------------------------------------- before the first step


def make_rules(cfg: Config, num_prompts: int) -> tuple[Uniform, dict]:
    """The sampler, and the stores by what they decide. ValueError for unknown names, and for rules that collide."""
    chosen = config.choose_rules(cfg.replay, METHODS)
    sampler = config.build(chosen.get("prompts", Uniform), cfg, num_prompts)
    stores = {place: config.build(chosen[place], cfg) for place in ("places", "extra") if place in chosen}
    return sampler, stores


class Run:
    """Everything a step needs; a checkpoint saves the parts that change. What can go wrong by a user's mistake goes
    wrong while it is made, as a ValueError or OSError of one line."""

    def __init__(self, cfg: Config):
        # What costs nothing comes first, so that a mistake is met before minutes of loading.
        config.check_training(cfg)
        data.check_name(cfg.data)
        config.check_rules(cfg, METHODS)
        self.cfg = cfg
        self.step = 0  # steps done
        self.rollouts = 0  # answers generated in them: the run's cost
        self.tokens = 0  # tokens of these answers
        self.mirror = log.Mirror(cfg.wandb, cfg.tensorboard)
        self.reward, self.judge = reward.choose(cfg)  # what is trained on, and what scores held-out answers
        reward.start(self.reward, self.judge)  # the grader's child processes, before CUDA
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        ranks.start()
        self.folder = Path(ranks.from_main(str(checkpoint.choose_folder(cfg, config.OUT))))

        # The model, and the prompts as it will see them.
        path = tiny.path_of(cfg)
        if not cfg.model and ranks.is_main():
            tiny.make(path, sharing=tiny.kind_of(cfg.task, cfg.sharing))
        ranks.barrier()
        on_host = offload.wants_offload(cfg, path)
        model, self.tokenizer, stop_ids = load_model(path, cfg.gradient_checkpointing, "cpu" if on_host else None)
        self.trained = grpo.Policy(model, cfg.dtype)  # has the weights that the optimiser moves, and that are saved
        check_policy(self.trained)
        self.policy = offload.working_copy(self.trained, cfg.dtype) if on_host else self.trained
        model = self.policy.model
        if use_varlen_attention(model, cfg.dtype):
            check_policy(self.policy)  # once more: it packs in another way
        self.prompts, self.held_out = prompts.load_prompts(cfg, self.tokenizer, (self.reward, self.judge), model)
        self.digest = prompts.digest(self.prompts)  # a run is resumed on the data it was started on
        self.gauge = log.Gauge(len(self.prompts))

        # The rules. Then the engine: vLLM takes its share of the GPU before the trainer does.
        self.sampler, self.stores = make_rules(cfg, len(self.prompts))
        filler = self.stores.get("places")
        self.refills = filler if isinstance(filler, DynamicSampling) else None  # a step fills its batch in rounds
        self.reference = None  # the model as loaded, for the KL
        if cfg.kl:
            self.reference = grpo.Policy(copy.deepcopy(model).requires_grad_(False), cfg.dtype)
        self.engine = rollout.make_engine(cfg.engine, model, path, stop_ids, cfg)

        # The trainer. Over several ranks its weights are sharded, layer by layer.
        for module in filter(None, (self.policy, self.reference)):
            layers = [part for part in module.modules() if type(part).__name__ in (model._no_split_modules or ())]
            ranks.shard(module, layers, cfg.dtype == "bfloat16")
        self.optimizer = make_optimizer(self.trained, cfg, self.policy)
        for rule in (self.sampler, *self.stores.values()):
            rule.attach(self)
        if cfg.resume:
            checkpoint.resume(self, FREE)
        self.engine.sync(self.policy)


def dry_run(cfg: Config, given: list[str]) -> str:
    """What a run would do and need; loads no weights, and refuses what a run would refuse."""
    rewards = reward.choose(cfg)
    checkpoint.choose_folder(cfg, config.OUT)
    if cfg.model:
        kind, tokenizer = plan.read(cfg.model)
    else:
        kind, tokenizer = tiny.shape(tiny.kind_of(cfg.task, cfg.sharing))
    asked, _ = prompts.load_prompts(cfg, tokenizer, rewards)
    make_rules(cfg, len(asked))
    return plan.report(cfg, config.origins(cfg, given, tiny.SETTINGS, METHODS), kind, tokenizer, asked)


# ---------------------------------------------------------------- one step, in parts


def generate(run: Run, numbers: list[int], step: int) -> list[Group]:
    """Answers to this rank's share of the prompts with these numbers."""
    started = perf_counter()
    mine = [run.prompts[i] for i in numbers[ranks.RANK :: ranks.WORLD]]
    groups = run.engine.generate(mine, run.cfg.answers_per_prompt, run.cfg.seed, step)
    run.seconds["rollout"] += perf_counter() - started
    return groups


def score(run: Run, groups: list[Group]) -> list[Group]:
    """Sets rewards and advantages of this rank's `groups`. Returns those of all ranks: every rank knows all
    groups, so that samplers and stores stay the same everywhere."""
    started = perf_counter()
    asked = [run.prompts[group.prompt] for group in groups]
    for group, values in zip(groups, reward.of_groups(groups, asked, run.tokenizer, run.reward), strict=True):
        group.rewards = torch.tensor(values, dtype=torch.float32)  # [G]
        group.advantages = grpo.advantages(group.rewards, run.cfg.advantage)
    if ranks.WORLD > 1:
        groups = ranks.gather(groups)
    run.seconds["reward"] += perf_counter() - started
    return groups


def evaluate(run: Run, when: str = "") -> dict[str, float]:
    """Share of held-out answers that are right, by stages too. Each rank answers its share. when: ends the names."""
    mine = ranks.share(run.held_out)
    groups = run.engine.generate(mine, run.cfg.eval_samples, run.cfg.seed, step=-1)
    values = reward.of_groups(groups, mine, run.tokenizer, run.judge)
    reward.counts()  # the grading of these answers is not the next step's
    return log.accuracies(run.held_out, mine, values, when)


def record(run: Run, step: int, groups: list[Group], batch: list[Group], trained: dict) -> dict:
    """Counts the step as done, and returns its row of metrics.jsonl."""
    run.step = step
    run.rollouts += sum(len(group.tokens) for group in groups)
    run.tokens += sum(len(tokens) for group in groups for tokens in group.tokens)
    row = {
        "step": step,
        "rollouts": run.rollouts,  # answers generated so far, and their tokens
        "tokens": run.tokens,
        "lr": run.cfg.lr,
        "distinct_prompts": int(run.sampler.seen.sum()),
        "trained_groups": sum(len(group.tokens) > 1 for group in batch),
        "seconds_total": sum(run.seconds.values()),
        "peak_memory_mb": log.peak_memory_mb(),
        # seconds_rollout, seconds_reward, seconds_update, seconds_sync
        **{f"seconds_{name}": value for name, value in run.seconds.items()},
        # reward, zero_variance, mean_abs_advantage, replayed, truncated, entropy, pass_rates_fresh
        **log.rollout_figures(groups, run.sampler.replays),
        # gain_epochs and gain_replay: how far a visit moves a prompt
        **run.gauge.observe(groups, run.sampler.replays),
        # reward_graded, reward_no_box, reward_timeouts: what became of the answers
        **reward.counts(),
        # sync_error, and the figures of support/token_sums.py: loss, grad_norm, engine_kl, ess_replayed and others
        **trained,
        # what the rules say of themselves: buffer, prompt_uses, heap, stored_groups, group_ages
        **run.sampler.figures(),
    }
    for store in run.stores.values():
        row |= store.figures(step)
    return row


def train(run: Run) -> int:
    """The loop. Returns the signal that ended it early, or 0."""
    cfg = run.cfg
    places = cfg.prompts_per_step
    first = evaluate(run, "_start") if run.held_out and run.step == 0 else {}
    stop = ranks.Stop()  # before the first step there is nothing to save, and a signal ends the run at once
    bar = log.steps_left(run)
    for step in bar:
        run.seconds = dict.fromkeys(("rollout", "reward", "update", "sync"), 0.0)
        groups: list[Group] = []  # all that are generated in this step
        useful: list[Group] = []  # those with a gradient; dead groups never reach the update
        for rule in (run.sampler, *run.stores.values()):
            rule.progress = max((step - 1) / cfg.steps, run.rollouts / (cfg.max_rollouts or float("inf")))

        # 1. Rollouts. One round; with dynamic sampling (DAPO) as many as it takes to fill the batch.
        for _ in range(cfg.max_rounds if run.refills else 1):
            numbers = run.sampler.draw(places, step)  # replay.py: which prompts
            if not numbers:
                break  # a small data set: all of its prompts are in this step already
            new = generate(run, numbers, step)  # rollout.py: G answers to each
            new = score(run, new)  # reward.py: 0 or 1 each; grpo.py: advantages
            correct = [group.num_correct for group in new]
            run.sampler.observe(numbers, correct, cfg.answers_per_prompt, step)  # replay.py: of dead groups too
            groups += new
            useful += [group for group in new if not group.dead]
            if run.refills and len(run.refills.stored) + len(useful) >= places:
                break

        # 2. The batch: useful fresh groups, stored ones in place of dead ones, stored answers on top.
        if run.engine.sleeps:
            run.engine.sleep()  # its memory is the trainer's until the sync
        batch = useful
        for store in run.stores.values():
            store.watch(groups, step)
            batch = store.complete(batch, places, step)  # replay.py

        # 3. The update, and the new weights into the engine.
        started = perf_counter()
        answers = grpo.to_answers(batch, run.prompts, step, cfg.mask_truncated)
        trained = grpo.update(run.policy, run.optimizer, answers, cfg, step, run.reference)
        for store in run.stores.values():
            store.learn(trained)
        run.seconds["update"] = perf_counter() - started
        trained["sync_error"] = run.engine.sync(run.policy)  # how far the engine's log-probs are off
        run.seconds["sync"] = perf_counter() - started - run.seconds["update"]

        # 4. Log, evaluate, save.
        row = record(run, step, groups, batch, trained) | first
        first = {}
        last = step >= cfg.steps or 0 < cfg.max_rollouts <= run.rollouts
        if run.held_out and (last or step % cfg.eval_every == 0):
            row |= evaluate(run)
        log.write(run, row, bar, groups)
        ended_by = stop.agreed() if ranks.WORLD > 1 else stop.signal
        if ended_by or last or step % cfg.save_every == 0:
            checkpoint.save(run)
        if ended_by or last:
            return ended_by
    return 0


# ---------------------------------------------------------------- the program


def main(argv: list[str]) -> int:
    """A run from beginning to end. Returns the exit code."""
    cfg, given = config.settings(argv, Config, METHODS, tiny.SETTINGS, __doc__)
    cfg.judge = reward.judge_of(cfg)
    memory = plan.explained(cfg, cfg.model or str(tiny.home(tiny.kind_of(cfg.task, cfg.sharing))))
    wrong = config.exits(2, plan.OutOfMemory, limits.UsersCodeBroken, OSError, all_ranks=True)
    broken = config.exits(1, rollout.EngineAstray, FloatingPointError, reward.VerifierBroken, all_ranks=True)
    with wrong, broken, memory, ranks.peers():
        with config.exits(2, ValueError, OSError):
            config.remark(cfg, given, METHODS)
            if cfg.dry_run:
                print(dry_run(cfg, given))
                return 0
            run = Run(cfg)
            folder.begin(run, asdict(cfg) | {"given": given, "prompts_sha256": run.digest})
        with folder.kept(run):
            ended_by = 0 if folder.is_done(run) else train(run)
        folder.end(run, ended_by)
    run.engine.close()
    ranks.stop()
    return 128 + ended_by if ended_by else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
