"""Chat templates: LLaMA-Factory's by name, and the tokenizer's own ("auto")."""
