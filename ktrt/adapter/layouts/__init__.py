"""One file per way of writing expert LoRA."""
