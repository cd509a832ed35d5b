"""Speed: choosing a few prompts among a million."""

import numpy as np


def within_reach(x: np.ndarray, key: np.ndarray, n: int) -> np.ndarray:
    """Those of prompts `x` whose `key` is among the n smallest, ties included. It changes no draw: it only spares sorting
    a million candidates for a batch of 32."""
    if not 0 < n < len(x):
        return x
    return x[key[x] <= np.partition(key[x], n - 1)[n - 1]]
