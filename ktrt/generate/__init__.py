"""Generation: the loop over tokens, CUDA graphs, sampling, text."""
