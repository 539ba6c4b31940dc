"""Settings for all tests."""

import os

# Before anything imports huggingface_hub: a test that would download fails at once and everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
