"""rlpt turns any web corpus into verifiable reinforcement-learning signal.

A policy thinks, then the held-out text says how good the thought was. Read `rlpt/train.py` first.
"""

__version__ = "0.1.0"
