"""KV caches: static slots in fixed memory, and snapshots to go back to."""
