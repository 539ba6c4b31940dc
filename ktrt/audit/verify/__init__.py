"""Proof that a loaded model computes what its files say."""
