"""The functions of transformers that compute linear attention and short convolutions, by family.

A family's modelling file holds them under these names, copies of the same few references; the
layers' forwards call them by these names, and nothing else in them depends on the length.
"""

from __future__ import annotations

_CONV = ("causal_conv1d_fn", "causal_conv1d_update")
_DELTA_RULE = (*_CONV, "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
_KIMI_DELTA = (*_CONV, "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
_MAMBA = (*_CONV, "mamba_selective_scan", "mamba_selective_state_update")
_MAMBA2 = (*_CONV, "mamba2_chunk_scan", "mamba2_selective_state_update")

# Folder of transformers.models → names. Where transformers has no function to replace, the layers
# run as they are: `minimax` (lightning attention: matrix products by block), `zaya`.
FAMILIES: dict[str, tuple[str, ...]] = {
    "bailing_hybrid": _KIMI_DELTA,
    "glm5_next": _KIMI_DELTA,
    "granitemoehybrid": _MAMBA2,
    "inkling": _CONV,
    "inkling2": _CONV,
    "inkling2_loop": _CONV,
    "jamba": _MAMBA,
    "kimi_linear": _KIMI_DELTA,
    "lara_mini": _DELTA_RULE,
    "lfm2_moe": _CONV,
    "nemotron_h": _MAMBA2,
    "qwen3_5_moe": _DELTA_RULE,
    "qwen3_next": _DELTA_RULE,
    "qwen4_exp": _DELTA_RULE,
}

# Parameters of the references, which a later transformers may change.
_RULE = "query key value g beta {}initial_state output_final_state use_qk_l2norm_in_kernel kwargs"
_STATE_UPDATE = "state hidden_states dt A B C D dt_bias dt_softplus z kwargs"
_SIGNATURES = {
    "causal_conv1d_fn": "hidden_states weight bias activation kwargs",
    "causal_conv1d_update": "hidden_states conv_state weight bias activation",
    "torch_chunk_gated_delta_rule": _RULE.format("chunk_size "),
    "torch_recurrent_gated_delta_rule": _RULE.format(""),
    "chunk_kimi_delta_attention": _RULE.format("chunk_size "),
    "recurrent_kimi_delta_attention": _RULE.format(""),
    "mamba_selective_scan": "hidden_states dt A B C D z delta_bias delta_softplus "
    "return_last_state use_mambapy use_associative_scan kwargs",
    "mamba_selective_state_update": _STATE_UPDATE,
    "mamba2_chunk_scan": "hidden_states dt A B C chunk_size D dt_bias initial_states dt_softplus "
    "dt_limit return_final_states kwargs",
    "mamba2_selective_state_update": _STATE_UPDATE,
}
PARAMETERS = {name: tuple(text.split()) for name, text in _SIGNATURES.items()}
