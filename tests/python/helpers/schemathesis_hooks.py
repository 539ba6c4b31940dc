"""Hooks of schemathesis' command line: without them no invented model would exist, and every answer
of its length would take a second."""

from typing import Any

import schemathesis

MODELS = ("demo", "adapter_a", "adapter_a*0.5+adapter_b*0.5")
LONGEST = 4


def map_body(context: Any, body: Any) -> Any:
    """Lets most requests name a model that is there, and keeps answers short."""
    if isinstance(body, dict):
        model = body.get("model")
        if isinstance(model, str) and (kind := len(model) % 4) < len(MODELS):
            body["model"] = MODELS[kind]
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            value = body.get(name)
            if isinstance(value, int) and value > LONGEST:
                body[name] = LONGEST
    return body


schemathesis.hook(map_body)
