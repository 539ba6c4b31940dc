"""Routes of the server: vllm."""
