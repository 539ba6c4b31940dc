"""Loads tokenizers and adds the words that adapters bring."""
