"""Files, streams, signals and progress: helpers that know nothing of models."""
