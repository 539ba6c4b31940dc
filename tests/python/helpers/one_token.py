"""Decodes a token with a loaded model: what is made at the first one is there afterwards."""

from ktrt.generate.step import Span, Step
from ktrt.loading.model import LoadedModel


def decode_a_token(loaded: LoadedModel) -> None:
    """Runs a prompt and one more token with the active adapters, and frees their memory."""
    pool = loaded.runner.pool
    slot = pool.open("one token", [1, 2, 3])
    for ids in ([1, 2, 3], [4]):
        loaded.runner.run(Step((Span(slot=slot, ids=ids),)))
    pool.close(slot, keep=False)
