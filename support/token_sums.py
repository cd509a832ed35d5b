"""The figures of an update, from sums over its answer tokens."""

from support import ranks

# fresh, stale: tokens of fresh and of replayed answers; ..._clipped: those where the clip acts; entropy: in nats;
# mismatch: k3 between engine and trainer, of fresh tokens; capped: tokens whose importance weight was truncated;
# w, w2: importance weights of replayed tokens, and their squares
NAMES = ("fresh", "stale", "fresh_clipped", "stale_clipped", "entropy", "mismatch", "capped", "w", "w2", "kl", "loss")


def token_figures(sums: dict, norms: list[float]) -> dict[str, float]:
    """Means over the tokens of all ranks; of loss, kl and gradient norm over optimiser steps, one of
    `norms` each."""
    totals = [float(sums[name]) for name in NAMES]
    max_ratio = sums["max_ratio"]
    if ranks.WORLD > 1:
        totals = ranks.total(totals)
        max_ratio = ranks.largest(max_ratio)
    s = dict(zip(NAMES, totals, strict=True))
    tokens = max(s["fresh"] + s["stale"], 1)
    steps = max(len(norms), 1)
    figures = {
        "loss": s["loss"] / steps,
        "entropy_trained": s["entropy"] / tokens,
        "clip_fraction": (s["fresh_clipped"] + s["stale_clipped"]) / tokens,
        "engine_kl": s["mismatch"] / max(s["fresh"], 1),
        "is_capped": s["capped"] / tokens,
        "kl": s["kl"] / steps,
        "trained_tokens": int(s["fresh"] + s["stale"]),
        "engine_max_ratio": max_ratio,
        "grad_norm": sum(norms) / steps,
        "optimizer_steps": len(norms),
    }
    if s["stale"]:
        figures |= {
            "clip_fraction_fresh": s["fresh_clipped"] / max(s["fresh"], 1),
            "clip_fraction_replayed": s["stale_clipped"] / s["stale"],
            "importance_replayed": s["w"] / s["stale"],  # near 1 while stored answers are still nearly on-policy
            "ess_replayed": s["w"] ** 2 / (s["stale"] * s["w2"]),  # effective sample size, as a share
        }
    return figures
