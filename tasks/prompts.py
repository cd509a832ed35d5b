"""The prompts of a run: from the embedded task, or from data; cleaned, split, and as token ids."""

from support import ranks
from tasks import benchmarks, data, own, stages, tiny


def load_prompts(cfg, tokenizer, rewards=(), model=None) -> tuple[list[data.Prompt], list[data.Prompt]]:
    """Training and held-out prompts, which have what the functions in `rewards` ask for, and all of whose tokens the
    `model` knows; the first rank prints what was left out. ValueError or OSError in one line."""
    notes = []
    instruction = cfg.instruction
    scorers = [reward for reward in rewards if isinstance(reward, own.Scorer)]
    if cfg.task:
        pairs, held_out, notes = stages.problems((cfg.task, *cfg.then), cfg.max_prompts, cfg.eval_prompts)
        instruction = "none" if instruction == "auto" else instruction  # rows are whole prompts
    elif cfg.data:
        # A built-in judge needs golds that it can read; functions of the user's take any.
        built_in = not own.is_own(cfg.reward) or (cfg.judge and not own.is_own(cfg.judge))
        pairs, note = clean_pairs(cfg, ("row" if built_in else "any gold") if scorers else "")
        pairs, held_out = data.split(pairs, min(cfg.eval_prompts, len(pairs) // 10))
        notes.append(f"{note}; {len(held_out)} of them held out for evaluation")
        if not tokenizer.chat_template:
            notes.append(data.PLAIN_TEXT)
    else:
        pairs, held_out = tiny.problems(cfg.sharing, cfg.eval_prompts, cfg.difficulty, cfg.max_prompts)
    if cfg.max_prompts and not cfg.task:
        pairs = pairs[: cfg.max_prompts]

    # From text to token ids, once and for all.
    thinking = {"on": True, "off": False}.get(cfg.thinking)
    limits = (tokenizer, cfg.max_prompt_tokens, thinking, instruction)
    prompts, skipped = data.encode(pairs, *limits)
    held_out, _ = data.encode(held_out if cfg.eval_every else [], *limits)
    if model:
        data.check_ids(prompts + held_out, model.get_input_embeddings().num_embeddings)
    for scorer in scorers:
        scorer.check(prompts + held_out)
    if skipped:
        notes.append(f"{skipped} of {len(prompts) + skipped} prompts exceed {cfg.max_prompt_tokens} tokens: left out")
    if notes and ranks.is_main():
        print("\n".join(notes))
    if len(prompts) < cfg.prompts_per_step:
        raise ValueError(
            f"{len(prompts)} training prompts are fewer than the {cfg.prompts_per_step} of one step; give more data or "
            "lower --prompts-per-step"
        )
    return prompts, held_out


def clean_pairs(cfg, keep: str = "") -> tuple[list[data.Pair], str]:
    """Different problems of `cfg.data`, none of them in a benchmark of eval.py, and a line of what went."""
    names = benchmarks.BENCHMARKS
    if cfg.keep_overlap or data.is_file(cfg.data):
        names = ()
    return data.clean(cfg, lambda: data.evaluation_problems(names, benchmark_texts), keep)


def benchmark_texts(name: str) -> list:
    _, problems, _ = benchmarks.load(name, {})
    return [problem.text for problem in problems]


def digest(prompts: list[data.Prompt]) -> str:
    """sha256 of problems and answers: a run is resumed on the data it was started on. ValueError if the ranks, each of
    which has read its own copy, have different ones."""
    pairs = []
    for prompt in prompts:
        pairs.append((prompt.text, prompt.answer) if prompt.row is None else (prompt.text, prompt.answer, prompt.row))
    found = data.fingerprint(pairs)
    if not ranks.agree(found):
        raise ValueError("the ranks have read different data; give all of them the same copy of --data")
    return found
