"""Corpus in, shards out. Knows nothing of torch, policies or rewards."""
