"""Records -> plain numbers, the summary of one evaluation, and what a reader must know of it.

All averages are ratios of sums over records and all intervals of one block come from the same resampled clusters.
An interval is {mean, ci_low, ci_high, clusters}; its bounds are null where clusters are too few, and `reason` says so.
Units are nats per continuation token unless said otherwise; an accuracy, rate or match is a share from 0 to 1.

    verdict, verdict_reasons                useful, harmless, harmful or inconclusive, and why; warnings stand last
    gain_heldout                            interval; per_byte; marginal_n, log of the mean probability of num_thoughts;
                                            marginal_minus_mean, interval (MEASURING, section 1)
    gain_greedy                             interval: of the thought at temperature 0, where there is one
    controls.NAME                           gain and own_minus_control, intervals
    wrong_target, null                      tests, with `passes`
    leak                                    passes, prompts, requests_changed, thoughts_changed, unrepeatable (counts)
    logp_no_think, logp_thought             intervals
    first_token                             gain, logp_no_think, logp_thought: intervals, nats per first token
    next_token_accuracy_no_think, _thought  means; _thought over sampled thoughts, _change its interval
    next_token_accuracy_majority, _greedy   intervals, each with its _change against no thought. A thought votes for the
                                            likeliest token after it, or its prediction's first; ties go to what was
                                            said first
    prediction_match, _greedy               intervals, where the policy predicts (RPT's prefix match)
    at_k.K                                  intervals: mean_gain, best_gain; mean_ and pass_ of next_token, prediction
    calibration.no_think, thought, greedy   ece, brier, confidence, accuracy (shares); bins: confidence, accuracy, count
    entropy_tiers                           source (annotations or policy), nested; easy, medium, hard: above (nats) and
                                            a block
    entropy_quantiles                       source; parts: from, to (nats) and a block
    by_thought_length                       from, to (tokens), prompts, thoughts, gain_heldout, logp_no_think,
                                            accuracies
    per_domain.NAME                         a block
    bits_per_byte                           interval, bits; documents, bytes
    thought                                 mean_len, std_len, max_len, len_histogram (tokens); entropy (nats a sampled
                                            token); closer_, empty_, distinct_, template_ and named_answer_rate;
                                            distinct_1, distinct_2 (shares of n-grams); opener_mass (a probability)
    evaluation                              what was evaluated: counts, unit, seed

A block has everything from verdict to prediction_match but null and leak, and its number of prompts.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlpt.evaluate.bits_per_byte import WindowRecord, bits_per_byte
from rlpt.evaluate.blocks import Table, at_k, block, calibrations, null
from rlpt.evaluate.leak import Leak
from rlpt.evaluate.quantities import Resampling, Sheet
from rlpt.evaluate.records import NULL, Record
from rlpt.evaluate.slices import by_entropy, by_thought_length, per_domain
from rlpt.evaluate.thoughts import thought_statistics

NULL_LIMIT = {"float32": 1e-5, "bfloat16": 1e-3}
"""Largest |mean| in nats per token by which the two paths to one number may differ."""


def summarise(
    records: Sequence[Record],
    windows: Sequence[WindowRecord],
    resampling: Resampling,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    leaked: Leak | None = None,
) -> Table:
    """The summary of one evaluation, ready for JSON. Its keys are those of `eval.json` and of the
    report.
    """
    sheet = Sheet.of(records)
    table = block(sheet, resampling)
    if any(NULL in record.logp for record in records):
        table["null"] = null(records, NULL_LIMIT[compute_dtype])
    if leaked is not None:
        table["leak"] = leaked.as_dict()
    table["at_k"] = at_k(sheet, resampling)
    table["calibration"] = calibrations(records)
    table |= by_entropy(sheet, resampling)
    table["by_thought_length"] = by_thought_length(sheet, resampling)
    table["bits_per_byte"] = _bits(windows, resampling)
    table["thought"] = thought_statistics(records)
    table["per_domain"] = per_domain(sheet, resampling)
    table["evaluation"] = {
        "prompts": len({record.key[:3] for record in records}),
        "documents": len({record.document for record in records}),
        "domains": len({record.domain for record in records}),
        "thoughts_per_prompt": 1 + max(record.sample for record in records),
        "continuation_tokens": int(np.mean([record.num_tokens for record in records])),
        "unit": resampling.unit,
        "bootstrap_draws": resampling.draws,
        "seed": resampling.seed,
        "compute_dtype": compute_dtype,
    }
    table["verdict_reasons"] += _warnings(table)
    return table


def _bits(windows: Sequence[WindowRecord], resampling: Resampling) -> Table | None:
    if not windows:
        return None
    measured = bits_per_byte(windows, resampling.unit, draws=resampling.draws, seed=resampling.seed)
    return {
        **measured.as_dict(),
        "documents": len(windows),
        "bytes": sum(w.num_bytes for w in windows),
    }


def _warnings(table: Table) -> list[str]:
    """What a reader of the verdict must know although the verdict does not depend on it."""
    found = []
    null, wrong, leak = (table.get(name) for name in ("null", "wrong_target", "leak"))
    if null is not None and not null["passes"]:
        found.append(
            f"warning: null control |mean| = {abs(null['mean']):.1e} exceeds {null['limit']:.0e}"
        )
    if wrong is not None and not wrong["passes"]:
        found.append(
            f"warning: wrong_target = {wrong['mean']:+.4f}, above 0: thoughts help any continuation"
        )
    if leak is not None and not leak["passes"]:
        found.append(
            f"warning: the text after the cut leaks: with other text {leak['requests_changed']} of "
            f"{leak['prompts']} requests and the thoughts of {leak['thoughts_changed']} changed"
        )
    return found
