"""Combinations of a method that make no sense: one line that says where, what and the remedy, before a model loads."""

from pathlib import Path

import pytest

from rlpt.config import RunConfig
from rlpt.train import run
from rlpt_data.strict import UserError, load

PRODUCT = "stage.1.reward={kind='likelihood', aggregate='product', baseline='none'}"
SHARE = "stage.1.reward={kind='likelihood', aggregate='log_mean_exp', baseline='none'}"
RANK = "stage.1.reward={kind='likelihood', shapes=[{kind='rank'}]}"
MAXRL = "stage.1.advantage={scale='group_mean'}"
ALONE = "stage.1.advantage={baseline='none'}"
MASK = "stage.1.gates=[{kind='mask_truncated'}]"
PAID_KL = "stage.1.kl={reference='frozen', weight=0.1, placement='reward', estimator='k1'}"
HINTED = (
    "stage.1.hint={}",
    "stage.1.reward={kind='match'}",
    "thought.prediction_tokens=2",
    ALONE,
    "stage.1.objective={ratio='none', mask='none'}",
)
REFUSED = {
    "one_sibling": (["stage.1.group_size=1"], "must be >= 2"),
    "rank_of_one": (["stage.1.group_size=1", RANK, ALONE], "must be >= 2"),
    "still_average": (["stage.1.ema_decay=1.0"], "should be less than 1"),
    "no_horizon": (["prompts.horizon_tokens=0"], "should be greater than 0"),
    "no_prediction": (["stage.1.reward={kind='match'}"], "set thought.prediction_tokens >= 1"),
    "centred_twice": ([SHARE], "set advantage.baseline = 'none'"),
    "masked_share": ([SHARE, ALONE, MASK], "use { kind = 'format' } instead"),
    "masked_rank": ([RANK, MASK], "use { kind = 'format' } instead"),
    "signed_mean": ([MAXRL], "must not be negative"),
    "kl_in_a_mean": ([PRODUCT, MAXRL, PAID_KL], "must not be negative"),
    "noise_in_a_mean": (
        [PRODUCT, MAXRL, "stage.1.reward_control='random'"],
        "must not be negative",
    ),
    "unused_copy": (
        ["stage.1.reward={kind='likelihood'}", "stage.1.reference_every=3"],
        "set it to 0, or kl.reference = 'frozen'",
    ),
    "noise_of_a_sum": (
        [
            "stage.1.reward={kind='likelihood', aggregate='sum'}",
            "stage.1.advantage={min_std='noise'}",
        ],
        "give a number",
    ),
    "critic_and_m2": (
        ["stage.1.objective={critic={}, mask='m2'}", ALONE],
        "which a critic gives in it",
    ),
    "centred_values_in_one_forward": (
        [
            "stage.1.objective={mask='clip', critic={centre=true}}",
            ALONE,
            "stage.1.update={score_with='training_forward'}",
        ],
        "needs the values of the whole step; use 'auto'",
    ),
    "permuted_alone": (
        ["stage.1.group_size=1", ALONE, "stage.1.reward_control='permuted'"],
        "set group_size >= 2",
    ),
    "hint_after_forwards": (
        ["stage.1.hint={}", "stage.1.reward={kind='likelihood'}"],
        "use a match or a judge",
    ),
    "hint_and_overlap": (
        [*HINTED, "stage.1.reward={kind='overlap'}"],
        "above 0 for right: use a match or a judge",
    ),
    "hint_and_length": (
        [*HINTED, "stage.1.gates=[{kind='length_budget', tokens=4, weight=0.1}]"],
        "leave out gates that add or take away",
    ),
    "hint_and_penalty": (
        [*HINTED, "stage.1.gates=[{kind='format', value=-1.0}]"],
        "leave out gates that add or take away",
    ),
    "hint_and_ratio": ([*HINTED, "stage.1.objective={}"], "set objective.ratio = 'none'"),
    "hint_and_baseline": ([*HINTED, "stage.1.advantage={}"], "teaches what is right alone"),
    "hint_and_critic": (
        [*HINTED, "stage.1.objective={ratio='none', mask='none', critic={}}"],
        "leave out objective.critic",
    ),
    "hint_and_reference": ([*HINTED, "stage.1.kl={reference='frozen'}"], "kl.reference = 'none'"),
    "hint_and_sampling": ([*HINTED, "stage.1.sampling={kind='dynamic'}"], "what they would see"),
    "hint_and_saved_groups": ([*HINTED, "rollout.save_groups=true"], "save_groups and saved"),
    "hint_and_reuse": ([*HINTED, "rollout.max_reuse=2"], "trains what it samples once"),
    "sequence_and_m2": (["stage.1.objective={ratio='sequence', mask='m2'}"], "use 'clip'"),
    "no_thought_long_enough": (
        ["stage.1.gates=[{kind='format', min_thought_tokens=6}]"],
        "a thought has 5 at most",
    ),
    "no_prediction_to_ask_for": (
        ["stage.1.gates=[{kind='format', min_prediction_tokens=1}]"],
        "a prediction has 0 at most",
    ),
    "no_foreign_model": (
        ["stage.1.reward={kind='likelihood', scorer='foreign', foreign={path='nowhere'}}"],
        "give a transformers model folder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(name: str, toml: Path) -> None:
    words, remedy = REFUSED[name]
    with pytest.raises(UserError) as caught:
        run(load(RunConfig, toml, words), dry_run=True)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
