"""The policy: layout of trunks and branches, one root forward, loading, and scoring of given tokens."""
