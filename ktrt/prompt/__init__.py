"""Turns messages into token ids: templates, tokenizer, fitting a conversation to the context.

Imports without torch.
"""
