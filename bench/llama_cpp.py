"""A real llama.cpp on GGUF files, through xllamacpp (requirements-dev.txt) or llama-cpp-python.

    with Server("exports/mine/mine-q8_0.gguf", context=128, slots=16) as server:
        rows = server.write([[1, 2, 3], [4]], max_new_tokens=10)             # greedy ids after each prompt
        ids = server.post("/tokenize", {"content": "text"})["tokens"]

xllamacpp is llama.cpp's own HTTP server in a thread of this process, on 127.0.0.1. It does not return the
logits of a prompt, so perplexity by llama.cpp's arithmetic needs llama-cpp-python. That package takes half an
hour to build, so it is in no requirements file.
"""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np


def has_server() -> bool:
    return find_spec("xllamacpp") is not None


def has_logits() -> bool:
    return find_spec("llama_cpp") is not None


class Server:
    """A loaded model that answers HTTP requests."""

    def __init__(self, path: str | Path, context: int, slots: int = 1, threads: int = 1,
                 exact: bool = False):
        """context: tokens per text; slots: number of texts at a time; exact: float32 keys and values, as
        ours."""
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = context * slots, slots
        params.n_gpu_layers, params.fit_params, params.warmup, params.verbosity = 0, False, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server, self.slots = xllamacpp.Server(params), slots

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: Any) -> None:
        del self.server

    def post(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer to a JSON request."""
        request = urllib.request.Request(self.server.listening_address + endpoint, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def write(self, prompts: list[list[int]], max_new_tokens: int, stop: bool = True) -> list[list[int]]:
        """The greedy ids after each prompt, for all prompts at a time.

        stop: stop at an end-of-text token. If False, such tokens are excluded and generation continues.
        """
        def complete(prompt: list[int]) -> list[int]:
            return self.post("/completion", {"prompt": prompt, "n_predict": max_new_tokens, "temperature": 0,
                                             "return_tokens": True, "cache_prompt": False,
                                             "ignore_eos": not stop})["tokens"]

        with ThreadPoolExecutor(self.slots) as pool:
            return list(pool.map(complete, prompts))


def mean_loss(path: str | Path, inputs: np.ndarray, targets: np.ndarray, threads: int = 1) -> float:
    """Loss in nats per token, by llama-cpp-python. Each row of inputs (n, T) predicts its targets (n, T)."""
    import llama_cpp
    model = llama_cpp.Llama(str(path), n_ctx=inputs.shape[1], n_batch=inputs.shape[1], n_threads=threads,
                            n_threads_batch=threads, logits_all=True, verbose=False)
    total = 0.0
    for row, expected in zip(inputs, targets, strict=True):
        model.reset()
        model.eval(row.tolist())
        logits = model.scores[:len(row)].astype(np.float64)  # (T, V)
        logits -= logits.max(-1, keepdims=True)
        total += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(row)), expected]).sum()
    return total / targets.size
