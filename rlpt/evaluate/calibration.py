"""Whether a policy is right as often as it says: its confidence in the likeliest first token against the truth."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

BINS = 10


def calibration(
    confidence_N: Float[np.ndarray, " N"], right_N: Bool[np.ndarray, " N"], bins: int = BINS
) -> dict[str, Any]:
    """Expected calibration error, Brier score and reliability table of top-1 predictions.

    ``confidence`` is a probability. Bins are of equal mass (Nguyen and O'Connor 2015, arXiv 1508.05154), in the order
    of confidence; the error is the mean over predictions of |accuracy - mean confidence| of their bin (Guo et al. 2017,
    arXiv 1706.04599, Eq. 3). It is biased upwards where bins hold few, so compare equal numbers of predictions. Brier:
    mean of (confidence - right)^2 of the likeliest token alone (Brier 1950).
    """
    order = np.argsort(confidence_N, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    right_N = right_N.astype(np.float64)
    table = [
        {
            "confidence": float(confidence_N[part].mean()),
            "accuracy": float(right_N[part].mean()),
            "count": len(part),
        }
        for part in parts
    ]
    error = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in table)
    return {
        "ece": error / len(order),
        "brier": float(((confidence_N - right_N) ** 2).mean()),
        "confidence": float(confidence_N.mean()),
        "accuracy": float(right_N.mean()),
        "bins": table,
    }
