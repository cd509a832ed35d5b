"""Figures of an update: sums over the answer tokens of all micro-batches and ranks, and the means that the log shows."""

import torch

from support import ranks


class TokenSums:
    """Sums by name. Each token counts as often as its answer stands for equal ones (logprobs.merge_equal).

    fresh, stale      tokens of fresh and of replayed answers
    fresh_clipped, stale_clipped    those of them where the clip acts
    entropy           of the policy at each token, in nats
    mismatch          k3 between engine and trainer, of fresh tokens
    capped            tokens whose importance weight was truncated
    w, w2             importance weights of replayed tokens, and their squares
    loss, kl          of each micro-batch, already summed over its tokens
    """

    NAMES = (
        "fresh",
        "stale",
        "fresh_clipped",
        "stale_clipped",
        "entropy",
        "mismatch",
        "capped",
        "w",
        "w2",
        "kl",
        "loss",
    )

    def __init__(self):
        self.sums = dict.fromkeys(self.NAMES, 0.0)
        self.max_ratio = 0.0

    def add(self, name: str, values: torch.Tensor, count: torch.Tensor | None = None) -> None:
        """values: [N], each to be taken `count` [N] times; or one number. They stay on their device until `figures`."""
        self.sums[name] += values if count is None else values.double() @ count

    def largest(self, ratios: torch.Tensor) -> None:
        self.max_ratio = max(self.max_ratio, ratios.max().item())

    def figures(self, optimizer_steps: int) -> dict[str, float]:
        """Means over the tokens of all ranks; loss and kl are means over optimiser steps."""
        totals = ranks.total([float(value) for value in self.sums.values()])
        s = dict(zip(self.sums, totals, strict=True))
        tokens = max(s["fresh"] + s["stale"], 1)
        figures = {
            "loss": s["loss"] / max(optimizer_steps, 1),
            "entropy_trained": s["entropy"] / tokens,
            "clip_fraction": (s["fresh_clipped"] + s["stale_clipped"]) / tokens,
            "engine_kl": s["mismatch"] / max(s["fresh"], 1),
            "is_capped": s["capped"] / tokens,
            "kl": s["kl"] / max(optimizer_steps, 1),
            "trained_tokens": int(s["fresh"] + s["stale"]),
            "engine_max_ratio": ranks.largest(self.max_ratio),
        }
        if s["stale"]:
            figures |= {
                "clip_fraction_fresh": s["fresh_clipped"] / max(s["fresh"], 1),
                "clip_fraction_replayed": s["stale_clipped"] / s["stale"],
                "importance_replayed": s["w"] / s["stale"],  # near 1 while stored answers are still nearly on-policy
                "ess_replayed": s["w"] ** 2 / (s["stale"] * s["w2"]),  # effective sample size, as a share
            }
        return figures
