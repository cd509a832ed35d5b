"""What a run will take, before it is started: seconds of a step, and GPU hours. Planned by arithmetic, not measured.

Bytes and operations of each part of a step, divided by what a GPU can do at most (CARDS, from its maker) and by the
share of it that is assumed to be had (below). `python -m lab.bench gpu` puts measured seconds beside them.

    rollout    each decoding step reads the engine's weights and the KV cache of all that run; 2 P operations a token
    update     2 U + 2 V H operations a token for the forward pass, twice that for the backward pass, once more what is
               made anew; attention on top
    optimiser  28 bytes a parameter, in the memory where weights and moments are; from and to the host 6 bytes
    sync       6 bytes a parameter

Answers are taken to be of all lengths up to --max-tokens alike: half of it on average. All groups are taken to be
useful: dead ones cost no update. Not counted: rewards, evaluations, sleep and wake, the start of a run.
"""

from dataclasses import dataclass

MATRIX = 0.35  # of the bf16 peak, in the update and where generation computes
MEMORY = 0.6  # of a GPU's memory bandwidth, in generation
LINK = 0.7  # of PCIe's, between host and GPU
HOST = 100e9  # bytes a second of host memory under AdamW on all cores
PROMPT = 150  # tokens of a prompt on average, as in sets of problems in mathematics


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: GB of memory, dense bf16 operations a second, bytes a second of memory and PCIe."""

    name: str
    size: int
    peak: float
    memory: float
    link: float


CARDS = (
    Card("RTX 4090", 24, 165e12, 1.01e12, 32e9),
    Card("L40S", 48, 362e12, 0.86e12, 32e9),
    Card("A100", 80, 312e12, 2.04e12, 32e9),
    Card("H100", 80, 989e12, 3.35e12, 64e9),
    Card("H200", 141, 989e12, 4.8e12, 64e9),
    Card("B200", 180, 2250e12, 8.0e12, 64e9),
)


def card_of(gpu: float, name: str = "") -> Card:
    """The card called `name`; if there is none, the newest whose memory is nearest to `gpu` bytes."""
    for card in CARDS:
        if card.name in name:
            return card
    return min(reversed(CARDS), key=lambda card: abs(card.size - gpu / 2**30))


def step_seconds(s: dict, cfg, found: dict, card: Card, full: bool = False) -> dict[str, float]:
    """Seconds of each part of a step. s: plan.shape's; found: plan.plan's, whose KV cache has to hold an answer.
    full: all answers are as long as they may be, as those of random weights are (lab/bench_gpu.py)."""
    prompt = min(PROMPT, cfg.max_prompt_tokens)
    longest = cfg.max_tokens
    mean = longest if full else longest / 2
    square = longest**2 if full else longest**2 / 3  # mean of the squared lengths
    answers = cfg.prompts_per_step * cfg.answers_per_prompt / found["gpus"]
    seen = prompt * mean + square / 2  # the sum over the tokens of an answer of what each of them sees
    return {
        "rollout": rollout_seconds(s, cfg, found, card, answers, mean, seen),
        "update": update_seconds(s, cfg, card, answers * (mean + prompt), answers * seen),
        "optimiser": cfg.epochs * cfg.minibatches * optimiser_seconds(s, found, card),
        "sync": 6 * s["parameters"] / (MEMORY * card.memory),
    }


def rollout_seconds(s: dict, cfg, found: dict, card: Card, answers: float, mean: float, seen: float) -> float:
    """answers: on each GPU, of `mean` tokens; seen: tokens that the tokens of one see, in all."""
    tokens = answers * mean
    token = found["kv"]["token"]
    # What an answer holds in the cache, on average over its life: so many run side by side.
    at_once = max(min(found["kv"]["pool"] / (token * seen / mean), cfg.rollout_batch, answers), 1)
    # Decoding steps: as many as the longest answer has, or all of the tokens take, and then the last ones alone.
    steps = max(cfg.max_tokens, tokens / at_once + cfg.max_tokens - mean)
    size = 2 if cfg.dtype == "bfloat16" else 4
    read = steps * size * s["parameters"] + answers * seen * token
    return read / (MEMORY * card.memory) + 2 * s["parameters"] * tokens / (MATRIX * card.peak)


def update_seconds(s: dict, cfg, card: Card, tokens: float, seen: float) -> float:
    """tokens: of the answers of a step on this GPU, with their prompts; seen: what each of them sees, in all."""
    head = s["vocabulary"] * s["hidden"]
    layers = s["linear"] if s["tied"] else s["linear"] - head
    forward = 2 * layers * tokens + 4 * s["layers"] * s["queries"] * seen
    head_forward = 2 * head * tokens
    passes = 4 if cfg.gradient_checkpointing else 3  # the backward pass is two, and made anew is one
    work = cfg.epochs * (passes * forward + 4 * head_forward)  # the logits are made anew in any case
    if cfg.epochs * cfg.minibatches > 1:
        work += forward + head_forward  # pi_old
    if cfg.kl > 0:
        work += cfg.epochs * (forward + head_forward)  # the reference
    peak = card.peak if cfg.dtype == "bfloat16" else card.peak / 2
    return work / (MATRIX * peak)


def optimiser_seconds(s: dict, found: dict, card: Card) -> float:
    p = s["parameters"]
    if found["place"] == "host":
        return 6 * p / (LINK * card.link) + 28 * p / HOST
    return 28 * p / found["gpus"] / (MEMORY * card.memory)


def gpu_hours(cfg, found: dict, seconds: dict[str, float]) -> float:
    """Of all steps, without evaluations and checkpoints."""
    return cfg.steps * sum(seconds.values()) * found["gpus"] / 3600


def line(s: dict, cfg, found: dict, name: str = "") -> str:
    """Costs for reading; name: of the GPU, as CUDA has it. Only where it fits, and vLLM generates."""
    if not found["fits"] or cfg.engine == "transformers":
        return "seconds and GPU hours are planned where a run fits, with vLLM"
    card = card_of(found["gpu"], name)
    seconds = step_seconds(s, cfg, found, card)
    parts = ", ".join(f"{part} {value:,.1f}" for part, value in seconds.items())
    return (
        f"planned, not measured, on {card.name}: {sum(seconds.values()):,.0f} s a step ({parts}), "
        f"{gpu_hours(cfg, found, seconds):,.0f} GPU hours for {cfg.steps:,} steps (assumptions: docs/usage.md#costs)"
    )


def cards_table() -> str:
    """CARDS and what is assumed of them, in Markdown."""
    lines = ["| GPU | memory, GB | bf16 peak, TFLOP/s | memory, TB/s | PCIe, GB/s |", "|---|---|---|---|---|"]
    for card in CARDS:
        lines.append(
            f"| {card.name} | {card.size} | {card.peak / 1e12:,.0f} | {card.memory / 1e12:.2f} "
            f"| {card.link / 1e9:.0f} |"
        )
    shares = (
        f"Assumed to be had: {MATRIX:.0%} of the bf16 peak, {MEMORY:.0%} of the memory's bandwidth, {LINK:.0%} of "
        f"PCIe's, and {HOST / 1e9:.0f} GB/s of host memory. A prompt has {PROMPT} tokens, an answer half of "
        "`--max-tokens`."
    )
    return "\n".join([*lines, "", shares])
