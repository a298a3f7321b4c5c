"""Rewards: one number per rollout, larger is better, detached from every gradient.

One small pure file each: float64 arithmetic on what scorers said, without engine, process group or
configuration. `rewards.py` wires them to scorers. A reward may look at a whole group, never across
groups: a group is whole on one rank, a batch is not.
"""
