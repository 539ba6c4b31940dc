"""Settings for all tests."""

import os

# Before anything imports torch: its OpenMP threads would spin between operations, on the cores that
# the engine's threads and other processes want (ten times slower on a busy machine).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before anything imports huggingface_hub: a test that would download fails at once and everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
