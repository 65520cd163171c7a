"""Rotary position embeddings: frequencies, tables, and two ways to stretch them to longer contexts.

    tables = RotaryTables()                                # a part of the model
    tables.rebuild(length=128, head_dim=64, theta=1e4, scaling=None, device="cpu")
    cos, sin = tables(slice(0, 10))                        # for `rotate` in model.py

RoPE rotates pair i of a head at position t by the angle t * theta^(-2i / D) (arXiv 2104.09864). `scaling` is
a dictionary with Hugging Face's keys:

    llama3  {"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor",
             "original_max_position_embeddings"}: Llama 3's reference code
    yarn    {"rope_type": "yarn", "factor", "original_max_position_embeddings"}, optionally "beta_fast",
            "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate":
            arXiv 2309.00071, section 3.2 and equation 22

Left out: linear, dynamic and longrope scaling.
"""

import math

import torch
from torch import Tensor, nn

from configurator import UserError
from modeling.attention import Positions

Rope = tuple[Tensor, Tensor]  # rows of the two tables: (T, D) each, or (B, 1, T, D)

# {rope_type: (required keys, optional keys)}, all of them positive numbers. An optional key may also be None
# or, except for attention_factor, 0: both mean its default.
KEYS = {"llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
        "yarn": (("factor", "original_max_position_embeddings"),
                 ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"))}


def require_valid(theta: float, scaling: dict | None) -> None:
    """Raise UserError for settings that no model can have, such as those with frequencies of infinity or NaN.
    """
    if not 1 < theta < 1e30:
        raise UserError(f"rope_theta={theta}: must be above 1 (and below 1e30)")
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in list(KEYS):  # a list, because a damaged file may have an unhashable value here
        raise UserError(f"rope_scaling={str(scaling)[:200]}: rope_type must be llama3 or yarn")
    required, optional = KEYS[kind]
    for key in (*required, *optional):
        value = scaling.get(key)
        is_default = key in optional and (value is None or (value == 0 and key != "attention_factor"))
        if not is_default and not (type(value) in (int, float) and 0 < value < 1e12):
            raise UserError(f"rope_scaling: {key}={str(value)[:40]}: must be a positive number")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError("rope_scaling: low_freq_factor must be below high_freq_factor")


def llama3(frequencies: Tensor, scaling: dict) -> Tensor:
    """Keep high frequencies, divide low ones by the factor, and interpolate in between.

    A frequency is high if its pair makes high_freq_factor or more full turns within the trained context, and
    low if it makes low_freq_factor or fewer.
    """
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,): 1 keeps the frequency, 0 divides it
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def yarn(frequencies: Tensor, theta: float, scaling: dict) -> Tensor:
    """Like `llama3`, but the interpolation is linear in the index of the pair, not in its turns."""
    pairs, trained = len(frequencies), scaling["original_max_position_embeddings"]

    def pair_with_turns(turns: float) -> float:
        """Return the (fractional) index of the pair that makes this many turns in the trained context."""
        return pairs * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    first = pair_with_turns(scaling.get("beta_fast") or 32)
    last = pair_with_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    # (D/2,): 0 up to the pair `first` keeps the frequency, 1 from the pair `last` divides it by the factor.
    slow = ((torch.arange(pairs, device="cpu") - first) / (last - first or 1e-3)).clamp(0, 1)
    return frequencies * (1 - slow + slow / scaling["factor"])


def yarn_factor(scaling: dict) -> float:
    """Return YaRN's factor for cos and sin, which scales the attention logits by its square.

    This is "attention_factor" if given, else the ratio of both mscales if given, else 0.1 ln(factor) + 1.
    """
    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)


def rope_frequencies(head_dim: int, theta: float, scaling: dict | None) -> tuple[Tensor, float]:
    """Return the angle per position of each pair, (head_dim / 2,), and the factor for cos and sin.

    The frequencies are float32 on the CPU, in radians. Raises UserError as `require_valid`.
    """
    require_valid(theta, scaling)
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)  # (D/2,)
    if scaling is None:
        return frequencies, 1.0
    if scaling["rope_type"] == "llama3":
        return llama3(frequencies, scaling), 1.0
    return yarn(frequencies, theta, scaling), yarn_factor(scaling)


class RotaryTables(nn.Module):
    """The tables for `rotate` at all positions of a context, (length, D) each: (cos, cos) and (-sin, sin).

    They are float32, and not saved in checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    def rebuild(self, length: int, head_dim: int, theta: float, scaling: dict | None,
                device: torch.device | str) -> None:
        """Compute the tables on the CPU and put them on `device`. Raises UserError as `rope_frequencies`."""
        frequencies, factor = rope_frequencies(head_dim, theta, scaling)
        angles = torch.arange(length, device="cpu").float()[:, None] * frequencies  # (length, D/2)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        # (length, D) each
        cos, sin = (torch.cat(halves, dim=-1).to(device) for halves in ((cos, cos), (-sin, sin)))
        if self.cos is not None and self.cos.shape == cos.shape and self.cos.device == cos.device:
            self.cos.copy_(cos)  # in place, because a rope_theta ramp changes the tables at every step
            self.sin.copy_(sin)
        else:
            self.cos, self.sin = cos, sin

    def forward(self, positions: Positions) -> Rope:
        """Return the rows at these positions; (B, T) positions get a dimension for the heads."""
        cos, sin = self.cos[positions], self.sin[positions]  # (T, D) or (B, T, D)
        return (cos, sin) if isinstance(positions, slice) else (cos[:, None], sin[:, None])  # (B, 1, T, D)
