"""Engines: prompts in, groups of thoughts out, with the log-probabilities and the weight version that sampled them."""
