"""Models and GPUs: the sizes of the released Qwen3, and what the memory plan says of them.

    python -m lab.gpus        prints the table of models and GPUs; python -m lab.figures puts it into the documentation

No GPU and no network: sizes are those of each model's config.json.
"""

import sys

from support import costs, plan
from train import Config

COMMON = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960}
SIZES = {
    "Qwen3-8B": (36, 4096, 12_288, 32, False),
    "Qwen3-4B": (36, 2560, 9728, 32, True),
    "Qwen3-1.7B": (28, 2048, 6144, 16, True),
    "Qwen3-0.6B": (28, 1024, 3072, 16, True),
}
ROWS = [("Qwen3-8B", gpus) for gpus in ("1x80", "1x141", "2x80", "8x80")]
ROWS += [(model, gpus) for model in ("Qwen3-4B", "Qwen3-1.7B", "Qwen3-0.6B") for gpus in ("1x24", "1x48", "1x80")]
PLACES = {"gpu": "on the GPU", "host": "on the host", "sharded": "sharded"}


def sizes_of(model: str) -> dict:
    """The arguments of transformers.Qwen3Config for a released model."""
    layers, hidden, mlp, heads, tied = SIZES[model]
    return COMMON | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


def row(model: str, gpus: str) -> list[str]:
    """One line of the table, with the defaults of train.py."""
    from transformers import Qwen3Config

    s = plan.shape(Qwen3Config(**sizes_of(model)))
    cfg = Config(model=model)
    count, gpu = plan.found_gpus(gpus)
    found = plan.plan(s, cfg, count, gpu)
    card = costs.card_of(gpu)
    first = [model, f"{gpus.replace('x', ' x ')} GB ({card.name})"]
    if not found["fits"]:
        changes = plan.changes(s, cfg, count, gpu)
        how = "larger GPUs, or a smaller model"
        if changes:
            how = ", ".join(changes)
        return [*first, f"does not fit: {how}", "", "", "", "", ""]
    where = PLACES[found["place"]]
    if found["place"] == "host":
        where += f", {plan.size(found['host']['needs'])} GiB there"
    seconds = costs.step_seconds(s, cfg, found, card)
    return [
        *first,
        where,
        plan.size(found["peaks"]["update"]),
        plan.size(found["kv"]["pool"]),
        f"{found['kv']['at_once']:.0f}",
        f"{sum(seconds.values()):,.0f}",
        f"{costs.gpu_hours(cfg, found, seconds):,.0f}",
    ]


def table(rows: list[tuple[str, str]] = ROWS) -> str:
    """These rows, in Markdown."""
    columns = ["model", "GPUs", "float32 weights and AdamW", "update, GiB", "KV cache, GiB", "at once"]
    columns += ["s a step", f"GPU hours of {Config().steps} steps"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row(model, gpus))} |" for model, gpus in rows]
    cfg = Config()
    head = (
        f"Planned, not measured, with the defaults: {cfg.prompts_per_step} x {cfg.answers_per_prompt} answers a step, "
        f"of up to {cfg.max_tokens:,} tokens. *At once*: so many of that length fit the KV cache."
    )
    return "\n".join([head, "", *lines])


def main() -> int:
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
