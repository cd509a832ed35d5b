"""GRPO with replay: sample answers, score them 0 or 1, push towards the better, and spend rollouts where they teach.

    python train.py --replay                               the embedded model and task, on a CPU, in minutes
    python train.py --model Qwen/Qwen3-8B --replay         the real thing
    python train.py --model PATH --data FILE.jsonl         your model, your problems

One step is in `train`: draw prompts, generate, score, observe, complete the batch, update, sync, log.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import eval
import grpo
import reward
from buffer import Group, GroupReplay, RolloutReplay, Surplus, make_stores
from lab.rules import Adaptive
from replay import GRESO, Prioritized, PromptReplay, Uniform
from rollout import EngineAstray, TransformersEngine, VLLMEngine, make_engine
from support import checkpoint, config, log, plan, plot, ranks, stats
from support.config import Config
from support.logprobs import LogProbModel, Sequence, load_model
from tasks import benchmarks, data, tiny


@dataclass
class Run:
    """Everything a step needs. A checkpoint saves the parts that change."""

    cfg: Config
    folder: Path
    model: LogProbModel  # the trained model, sharded where there are several ranks
    reference: LogProbModel | None  # the model as loaded, for the KL
    tokenizer: object
    engine: TransformersEngine | VLLMEngine
    optimizer: torch.optim.Optimizer
    reward: Callable[[list[str], list[str]], list[float]]
    judge: Callable[[list[str], list[str]], list[float]]  # of held-out answers: the same, or for a control the task's
    prompts: list[data.Prompt]
    held_out: list[data.Prompt]
    digest: str  # of the prompts: a run is resumed on the data it was started on
    sampler: Uniform | PromptReplay | Prioritized | GRESO | Adaptive
    stores: dict[str, Surplus | GroupReplay | RolloutReplay]
    gauge: log.Gauge
    mirror: log.Mirror
    step: int = 0  # done so far; so are these two, which are the run's cost
    rollouts: int = 0
    tokens: int = 0


def prepare(cfg: Config) -> Run:
    """Everything that can go wrong by a user's mistake goes wrong here, as a ValueError or OSError of one line."""
    switches, mirror = config.validate(cfg), log.Mirror(cfg.wandb, cfg.tensorboard)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    reward_function = reward.load(cfg.reward)
    judge = reward.load(("math" if cfg.data else "equation") if cfg.reward in reward.CONTROLS else cfg.reward)
    if judge is reward.grade:
        reward.start()  # its child processes, before CUDA
    ranks.start()
    folder = Path(ranks.from_main(str(checkpoint.choose_folder(cfg, config.OUT))))
    path = cfg.model or str(tiny.home(cfg.sharing))
    if not cfg.model and ranks.is_main():
        tiny.make(path, sharing=cfg.sharing)
    ranks.barrier()
    model, tokenizer, stop_ids = load_model(path, cfg.gradient_checkpointing, cfg.attention)
    prompts, held_out = load_prompts(cfg, tokenizer)
    sampler = make_sampler(switches.get("prompts"), len(prompts), cfg)
    reference = LogProbModel(copy.deepcopy(model).requires_grad_(False)) if cfg.kl else None
    engine = make_engine(cfg.engine, model, path, stop_ids, cfg)
    scorer = LogProbModel(model)

    def drift_of_stored(groups: list[Group]) -> list[float]:
        pairs = [(prompts[g.prompt].ids, zip(g.tokens, g.logprobs, strict=True)) for g in groups]
        return grpo.drift(scorer, [[Sequence(ids, *answer, 0.0, 0) for answer in group] for ids, group in pairs], cfg)

    stores = make_stores(switches, cfg, drift_of_stored)
    for module in filter(None, (scorer, reference)):
        layers = [m for m in module.modules() if type(m).__name__ in (model._no_split_modules or ())]
        ranks.shard(module, layers, cfg.dtype == "bfloat16")
    run = Run(
        cfg=cfg, folder=folder, model=scorer, reference=reference, tokenizer=tokenizer, engine=engine,
        optimizer=grpo.make_optimizer(scorer, cfg), reward=reward_function, judge=judge, prompts=prompts,
        held_out=held_out, digest=data.fingerprint((p.text, p.answer) for p in prompts), sampler=sampler, stores=stores,
        gauge=log.Gauge(len(prompts)), mirror=mirror,
    )  # fmt: skip
    if cfg.resume:
        checkpoint.resume(run)
        engine.sync(scorer)
    return run


def make_sampler(name: str | None, n: int, cfg: Config):
    """For `n` prompts, with the settings of `cfg`. ValueError for settings that cannot be meant."""
    if name == "prompt":
        return PromptReplay(n, cfg.seed, cfg.band, cfg.share, cfg.cooldown, cfg.max_reuse)
    if name == "prioritized":
        return Prioritized(n, cfg.seed, cfg.smoothing, cfg.initial_priority, cfg.explore, cfg.retest_every,
                           cfg.retest_solved, cfg.tie_bias)  # fmt: skip
    if name == "adaptive":
        return Adaptive(n, cfg.seed, cfg.share, cfg.cooldown)
    return GRESO(n, cfg.seed, cfg.dead_target) if name == "greso" else Uniform(n, cfg.seed)


def load_prompts(cfg: Config, tokenizer) -> tuple[list[data.Prompt], list[data.Prompt]]:
    """Training and held-out prompts."""
    notes = []
    if cfg.data:
        names = () if cfg.keep_overlap or data.is_file(cfg.data) else benchmarks.BENCHMARKS
        tests, missing = data.evaluation_problems(names, lambda name: [p.text for p in benchmarks.load(name, {})[1]])
        pairs, note = data.prepare(cfg, tests, missing)
        pairs, held_out = data.split(pairs, min(cfg.eval_prompts, len(pairs) // 10))
        notes.append(f"{note}; {len(held_out)} of them held out for evaluation")
        if not tokenizer.chat_template:
            notes.append(data.PLAIN_TEXT)
    else:
        pairs, held_out = tiny.problems(cfg.sharing, cfg.eval_prompts, cfg.difficulty, cfg.max_prompts)
    thinking = {"on": True, "off": False}.get(cfg.thinking)
    prompts, skipped = data.encode(pairs[: cfg.max_prompts or None], tokenizer, cfg.max_prompt_tokens, thinking)
    if skipped:
        notes.append(f"{skipped} of {len(prompts) + skipped} prompts exceed {cfg.max_prompt_tokens} tokens: left out")
    if notes and ranks.is_main():
        print("\n".join(notes))
    if len(prompts) < cfg.prompts_per_step:
        raise ValueError(
            f"{len(prompts)} training prompts are fewer than the {cfg.prompts_per_step} of one step; give more data or "
            "lower --prompts-per-step"
        )
    return prompts, data.encode(held_out, tokenizer, cfg.max_prompt_tokens, thinking)[0]


def dry_run(cfg: Config, given: list[str]) -> str:
    """What a run would do and need; loads no weights."""
    switches = config.validate(cfg)
    reward.load(cfg.reward)  # this, and the folder, sampler and stores: to refuse what a run would
    checkpoint.choose_folder(cfg, config.OUT)
    kind, tokenizer = plan.read(cfg.model) if cfg.model else (tiny.make_model(0).config, tiny.make_tokenizer())
    prompts = load_prompts(cfg, tokenizer)[0]
    make_sampler(switches.get("prompts"), len(prompts), cfg)
    make_stores(switches, cfg)
    return plan.report(cfg, given, kind, tokenizer, prompts)


# ---------------------------------------------------------------- one step, in parts


def generate(run: Run, drawn: list[int], step: int) -> list[Group]:
    """Answers to this rank's share of the drawn prompts."""
    mine = [run.prompts[i] for i in ranks.share(drawn)]
    return run.engine.generate(mine, run.cfg.answers_per_prompt, run.cfg.seed, step)


def score(run: Run, groups: list[Group]) -> list[list[str]]:
    """Sets rewards and advantages of `groups`; returns their texts."""
    texts = [[run.tokenizer.decode(t, skip_special_tokens=True) for t in group.tokens] for group in groups]
    golds = [run.prompts[group.prompt].answer for group in groups for _ in group.tokens]
    rewards = torch.tensor(run.reward([t for group in texts for t in group], golds), dtype=torch.float32)
    for group, values in zip(groups, rewards.split([len(g.tokens) for g in groups]), strict=True):  # [G]
        group.rewards, group.advantages = values.clone(), grpo.advantages(values, run.cfg.advantage)
    return texts


def observe(sampler, groups: list[Group], step: int) -> None:
    """Tells `sampler` how `groups` turned out; of rewards other than 0 and 1 the variance too, as it is not p(1-p)."""
    rewards = torch.stack([group.rewards for group in groups]).double()  # [P, G]
    binary = bool(((rewards == 0) | (rewards == 1)).all())
    variance = None if binary else rewards.var(1, unbiased=False).tolist()
    indices, counts = [group.prompt for group in groups], [rewards.shape[1]] * len(groups)
    sampler.observe(indices, rewards.sum(1).tolist(), counts, step, variance=variance)


def training_sequences(run: Run, batch: list[Group], step: int) -> list[Sequence]:
    """The answers of `batch`. Equal answers of a group become one with a count, which leaves the gradient unchanged
    (as far as the engine gave equal tokens equal log-probs; in bf16 they may differ by rounding)."""
    sequences: dict[tuple, Sequence] = {}
    for group in batch:
        advantages = group.advantages.tolist()
        for tokens, logprobs, advantage, cut in zip(
            group.tokens, group.logprobs, advantages, group.truncated, strict=True
        ):
            key = (group.prompt, group.birth, advantage, tokens.numpy().tobytes())
            if cut and run.cfg.mask_truncated:
                continue
            if key in sequences:
                sequences[key].count += 1
            else:
                ids = run.prompts[group.prompt].ids
                sequences[key] = Sequence(ids, tokens, logprobs, advantage, step - group.birth)
    return list(sequences.values())


def evaluate(run: Run) -> float:
    """Held-out accuracy; each rank answers its share."""
    mine = ranks.share(run.held_out)
    settings = (run.tokenizer, run.judge, run.cfg.eval_samples, run.cfg.seed)
    mean = eval.accuracy(run.engine, mine, *settings)  # without prompts too: ranks may share an engine
    return ranks.total([mean * len(mine)])[0] / len(run.held_out)


def record(run: Run, step: int, groups: list[Group], batch: list[Group], trained: dict, seconds: dict) -> dict:
    """Counts the step as done, and returns its row of metrics.jsonl."""
    run.step = step
    run.rollouts += sum(len(group.tokens) for group in groups)
    run.tokens += sum(len(tokens) for group in groups for tokens in group.tokens)
    run.gauge.observe(groups, run.sampler.epochs.replays)
    row = {"step": step} | log.rollout_figures(groups, run.sampler.epochs.replays) | trained | run.gauge.figures()
    row |= {"distinct_prompts": int(run.sampler.epochs.seen.sum()), "rollouts": run.rollouts, "tokens": run.tokens}
    row |= {"lr": run.cfg.lr, "trained_groups": sum(len(group.tokens) > 1 for group in batch)} | run.sampler.figures()
    graded = reward.counts()
    row |= dict(zip(graded, map(int, ranks.total(list(graded.values()))), strict=True))
    for store in run.stores.values():
        row |= store.figures(step)
    row |= {f"seconds_{name}": value for name, value in seconds.items()}
    return row | {"seconds_total": sum(seconds.values()), "peak_memory_mb": log.peak_memory_mb()}


def finished(run: Run) -> bool:
    return run.step >= run.cfg.steps or 0 < run.cfg.max_rollouts <= run.rollouts


def train(run: Run) -> int:
    """The loop. Returns the signal that ended it early, or 0."""
    cfg, stop, ended_by = run.cfg, ranks.Stop(), 0
    if finished(run):
        return 0  # resumed when nothing was left to do
    surplus, evaluates = run.stores.get("dapo"), cfg.eval_every and run.held_out
    before = {"eval_accuracy_start": evaluate(run)} if evaluates and run.step == 0 else {}
    progress = log.progress(run)
    with log.profiler(run.folder, cfg.profile) as profiler:
        for step in progress:
            clock, seconds = log.Clock(), dict.fromkeys(("rollout", "reward", "update", "sync"), 0.0)
            groups: list[Group] = []
            useful: list[Group] = []  # those with a gradient; dead groups never reach the update
            own: list[tuple[Group, list[str]]] = []  # this rank's, with their texts
            reward.counts()  # those of an evaluation are not this step's

            # Rollouts: one round, or with dynamic sampling (DAPO) as many as fill the batch, within bounds.
            for _ in range(cfg.max_rounds if surplus else 1):
                drawn = run.sampler.draw(cfg.prompts_per_step, step)
                if not drawn:
                    break  # a small data set: every prompt is in this step already
                mine = generate(run, drawn, step)
                seconds["rollout"] += clock.lap()
                own += zip(mine, score(run, mine), strict=True)
                new = ranks.gather(mine)  # every rank knows all groups: samplers and stores stay the same everywhere
                seconds["reward"] += clock.lap()
                observe(run.sampler, new, step)  # dead groups too: that a prompt is solved is worth knowing
                groups += new
                useful += [group for group in new if not group.dead]
                if surplus and len(surplus.carried) + len(useful) >= cfg.prompts_per_step:
                    break

            # What is trained on: useful fresh groups, stored ones in place of dead ones, stored answers on top.
            run.engine.sleep()  # its memory is the trainer's until the sync
            batch = useful
            for store in run.stores.values():
                batch = store.complete(batch, cfg.prompts_per_step, step)
            sequences = training_sequences(run, batch, step)

            trained = grpo.update(run.model, run.optimizer, sequences, cfg, step, run.reference)
            if "group" in run.stores:
                run.stores["group"].adjust(trained.get("ess_replayed"))
            seconds["update"] += clock.lap()
            trained["sync_error"] = run.engine.sync(run.model)
            seconds["sync"] += clock.lap()

            row = record(run, step, groups, batch, trained, seconds) | before
            before = {}
            last = finished(run)
            if evaluates and (step % cfg.eval_every == 0 or last):
                row["eval_accuracy"] = evaluate(run)
            log.write(run, row, progress, own)
            profiler.step()
            ended_by = stop.agreed()
            if ended_by or step % cfg.save_every == 0 or last:
                checkpoint.save(run)
            if ended_by or last:
                break
    return ended_by


def start(cfg: Config, given: list[str]) -> int:
    """A run from beginning to end. Returns the exit code."""
    try:
        if cfg.dry_run:
            print(dry_run(cfg, given))
            return 0
        run = prepare(cfg)
        run.folder = Path(ranks.from_main(str(checkpoint.claim(run.folder, cfg)) if ranks.is_main() else ""))
        if ranks.is_main():
            run.mirror.start(run.folder, asdict(cfg), run.step)
    except (ValueError, OSError) as error:
        if ranks.is_main():
            print(f"error: {error}", file=sys.stderr)
        return 2
    if ranks.is_main():
        settings = asdict(cfg) | {"given": given, "prompts_sha256": run.digest, "commit": stats.commit()}
        (run.folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        going = "nothing left to do" if finished(run) else "going on"
        print(f"run folder: {run.folder}{f', {going} after step {run.step}' if run.step else ''}")
    ended_by = train(run)
    if not ended_by:
        checkpoint.export(run)
    if ranks.is_main() and ended_by:
        print(f"saved after step {run.step}; go on with --resume --out {run.folder}")
    elif ranks.is_main():
        print(log.summary(plot.read(run.folder / "metrics.jsonl")))
        print(f"model: {run.folder / 'model'}, curves: {plot.curves(run.folder)}")
    run.mirror.close()
    run.engine.close()
    ranks.stop()
    return 128 + ended_by if ended_by else 0


def main(argv: list[str]) -> int:
    cfg, given = config.parse(argv, __doc__)
    try:
        return start(cfg, given)
    except torch.OutOfMemoryError:
        kind, _ = plan.read(cfg.model or str(tiny.home(cfg.sharing)))
        print(f"error: {plan.out_of_memory(cfg, kind)}", file=sys.stderr)
        return 2
    except (EngineAstray, FloatingPointError, reward.VerifierBroken, reward.RewardBroken) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, reward.RewardBroken) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
