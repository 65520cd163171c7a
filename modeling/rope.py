"""Rotary position embedding's frequencies, and the two ways of stretching them to longer contexts.

    frequencies, factor = rope_frequencies(head_dim=64, theta=1e4, scaling=None)

RoPE: arXiv 2104.09864. Scaling, in Hugging Face's keys: {"rope_type": "llama3", "factor": ..,
"low_freq_factor": .., "high_freq_factor": .., "original_max_position_embeddings": ..} as in Llama 3's
reference code, or {"rope_type": "yarn", "factor": .., "original_max_position_embeddings": ..} with optional
"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate": arXiv 2309.00071,
section 3.2 and equation 22. model.py turns them into tables. Left out: linear, dynamic and longrope scaling.
"""

import math

import torch
from torch import Tensor

from configurator import UserError


def rope_frequencies(head_dim: int, theta: float, scaling: dict | None) -> tuple[Tensor, float]:
    """Angle per position of each pair, (head_dim / 2,) float32, and the factor on cos and sin.

    Always on the CPU, in float32. Raises UserError for an unknown kind of scaling or a missing key.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    if scaling is None:
        return frequencies, 1.0
    try:
        if scaling["rope_type"] == "llama3":
            return llama3(frequencies, scaling), 1.0
        if scaling["rope_type"] == "yarn":
            return yarn(frequencies, theta, scaling), yarn_factor(scaling)
    except KeyError as error:
        raise UserError(f"rope_scaling={scaling}: needs the key {error}") from None
    raise UserError(f"rope_scaling={scaling}: rope_type must be llama3 or yarn")


def llama3(frequencies: Tensor, scaling: dict) -> Tensor:
    """Keep pairs that turn often in the trained context, slow rare ones by the factor, blend in between."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def yarn(frequencies: Tensor, theta: float, scaling: dict) -> Tensor:
    """The same idea, blended linearly over the index of the pair instead of over its turns."""
    pairs, trained = len(frequencies), scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        """Index (fractional) of the pair that turns so often in the trained context."""
        return pairs * math.log(trained / (times * 2 * math.pi)) / math.log(theta)

    first = pair_that_turns(scaling.get("beta_fast") or 32)
    last = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    slow = ((torch.arange(pairs, device="cpu") - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies * (1 - slow + slow / scaling["factor"])


def yarn_factor(scaling: dict) -> float:
    """YaRN's attention temperature: as given, or 0.1 ln(factor) + 1, or, with both mscales, a ratio."""
    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)
