"""Compares two commits: the bits of the demo model's logits, and the speed of the benches."""
