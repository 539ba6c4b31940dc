"""Runs llama.cpp in a separate process, through llama-cpp-python's ctypes functions: one line of
JSON in, one out. Started by compare_llama_cpp.py.

llama-batched-bench does not serve: it accepts ``--lora`` and does not apply it (0.3.36), and to
alternate with another program it would have to load the model for every measurement. Measured is
the same: ``llama_decode`` of a prompt, then of one token at a time.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import statistics
import sys
import time
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as api

Reply = dict[str, Any]
# The routed experts' tensors, as a regular expression; and the tokens of one forward, with a GPU:
# weights that lie in RAM are copied to it once for each.
EXPERTS = b"ffn_.*_exps"
GPU_BATCH = 2048


class Override(ctypes.Structure):
    """``llama_model_tensor_buft_override`` of llama.h."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def experts_in_ram(library: Any) -> ctypes.Array[Override]:
    """Returns llama.cpp's overrides that leave the routed experts in RAM, on the CPU."""
    library.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    ram = library.ggml_backend_cpu_buffer_type()
    return (Override * 2)(Override(EXPERTS, ram), Override(None, None))


class LlamaCpp:
    """A model with a context of ``context`` tokens, and an adapter to switch on and off."""

    def __init__(
        self, model: str, lora: str, threads: int, context: int, plain_buffers: bool = False,
        gpu: bool = False,
    ) -> None:  # fmt: skip
        """``plain_buffers``: keeps the file's weights, without repacking (for AMX, for example).
        ``gpu``: everything but the routed experts on the GPU."""
        if not gpu:  # its threads crash in Python's callback
            api.llama_log_set(_quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = not plain_buffers
        if gpu:
            self._experts_in_ram(model_params)
        self._model = api.llama_model_load_from_file(model.encode(), model_params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        params = api.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = threads
        if gpu:
            params.n_batch = params.n_ubatch = GPU_BATCH
        self._batch = params.n_batch
        self._context = api.llama_init_from_model(self._model, params)
        self._adapter = api.llama_adapter_lora_init(self._model, lora.encode())
        if not self._context or not self._adapter:
            raise SystemExit(f"llama.cpp cannot load {lora}, or make a context")
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._memory = api.llama_get_memory(self._context)

    def _experts_in_ram(self, model_params: Any) -> None:
        if not api.llama_supports_gpu_offload():
            raise SystemExit(
                "this llama.cpp was built without a GPU: --llama-cpp names the folder of one that "
                "was built with it (cmake -DGGML_CUDA=ON -DBUILD_SHARED_LIBS=ON)"
            )
        model_params.n_gpu_layers = 999
        self._overrides = experts_in_ram(api._lib)  # llama.cpp reads it while loading
        kind = dict(type(model_params)._fields_)["tensor_buft_overrides"]
        model_params.tensor_buft_overrides = ctypes.cast(self._overrides, kind)

    def use_lora(self, enabled: bool) -> None:
        count = int(enabled)
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(self._adapter)
        scales = (ctypes.c_float * 1)(1.0)
        if api.llama_set_adapters_lora(self._context, adapters, count, scales) != 0:
            raise SystemExit("llama_set_adapters_lora failed")

    def decode(self, ids: list[int]) -> None:
        """Appends ``ids`` to the sequence; computes the logits of the last one."""
        for first in range(0, len(ids), self._batch):
            some = ids[first : first + self._batch]
            tokens = (api.llama_token * len(some))(*some)
            status = api.llama_decode(self._context, api.llama_batch_get_one(tokens, len(some)))
            if status != 0:
                raise SystemExit(f"llama_decode failed: {status}")
        api.llama_synchronize(self._context)

    def measure(self, prompt: int, new: int, seed: int) -> Reply:
        """Returns seconds of a prompt of random ids, and the median of the tokens after it."""
        draw = random.Random(seed)
        ids = [draw.randrange(2, self._vocab) for _ in range(prompt + new)]
        api.llama_memory_clear(self._memory, False)
        times = [time.perf_counter()]
        for chunk in (ids[:prompt], *([each] for each in ids[prompt:])):
            self.decode(chunk)
            times.append(time.perf_counter())
        prefill, *each = (end - start for start, end in itertools.pairwise(times))
        return {"prefill": prefill, "decode": statistics.median(each) if each else None}

    def logits(self, ids: list[int], file: str) -> Reply:
        """Writes float32 logits [ids, vocabulary] of a sequence, fed token by token, to a .npy
        file."""
        api.llama_memory_clear(self._memory, False)
        rows = []
        for each in ids:
            self.decode([each])
            found = api.llama_get_logits_ith(self._context, -1)
            rows.append(np.ctypeslib.as_array(found, (self._vocab,)).copy())
        np.save(file, np.stack(rows))
        return {"vocab": self._vocab}


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(level: int, text: bytes, _user: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    args = json.loads(sys.argv[1])
    party = LlamaCpp(**args)
    print(json.dumps({"system": api.llama_print_system_info().decode()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        party.use_lora(request.pop("lora"))
        action = getattr(party, request.pop("do"))
        print(json.dumps(action(**request)), flush=True)


if __name__ == "__main__":
    main()
