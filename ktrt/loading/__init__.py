"""Folder and adapters → running model: plan, memory, weights, pack cache."""
