"""Held-out evaluation: thoughts are sampled, the held-out text is scored with and without them and
under controls.
"""
