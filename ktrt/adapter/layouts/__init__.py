"""Reads expert LoRA, one file per layout."""
