"""Loads tokenizers and adds the words of adapters."""
