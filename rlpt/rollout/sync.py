"""Trainer weights -> engine, stamped with the step that made them."""

from rlpt.policy.load import named_full_tensors
from rlpt.policy.policy import Policy
from rlpt.rollout.engine import Engine


def publish(policy: Policy, engine: Engine, version: int) -> None:
    """Send every tensor, one at a time. Collective: every rank publishes to its own engine."""
    engine.publish(named_full_tensors(policy), version)
