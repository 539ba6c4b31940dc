"""``ktrt serve``: a model and its adapters over HTTP: OpenAI's, Anthropic's and vLLM's APIs."""
