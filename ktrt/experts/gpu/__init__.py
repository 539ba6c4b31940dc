"""The GPU's share of the routed experts: residents, streaming, arithmetic."""
