"""Prefix match: is the prediction, byte for byte, the beginning of the held-out text?"""

from collections.abc import Sequence
from itertools import accumulate


def prefix_match(prediction: bytes, gold_tokens: Sequence[bytes]) -> float:
    """1 iff the prediction is a prefix of the gold bytes and ends where a gold token ends, else 0.

    RPT, arXiv 2506.08007, Eq. 3. Bytes, so that another tokenisation of the right text is right. An
    empty prediction scores 0. The caller keeps the gold at least as long as any prediction.
    """
    if not prediction or not b"".join(gold_tokens).startswith(prediction):
        return 0.0
    return float(len(prediction) in set(accumulate(len(token) for token in gold_tokens)))
