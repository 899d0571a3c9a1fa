"""Small layers that several mixers share: norms, rotary embedding, head counts, SwiGLU."""

from typing import TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from lingen.kernels.fp8 import Quantized, as_its, input_dtype
from lingen.kernels.swiglu import swiglu
from lingen.kernels.window_attention import rms_norm
from lingen.recipe.errors import SettingError
from lingen.recipe.sections import Triple

P = TypeVar("P", bound=Tensor)
M = TypeVar("M", bound=type[nn.Module])
N = TypeVar("N", bound=nn.Module)
_UNDECAYED = "_no_weight_decay"
_FLOAT32, _FLOAT32_IN_TRAINING = "_stays_float32", "_trains_in_float32"


def stays_float32(kind: M) -> M:
    """Tags a class of modules whose own parameters are never cast to 16 bits: not where a model is put into a lower
    precision to sample, not where the blocks of a sharded one are gathered in bfloat16."""
    setattr(kind, _FLOAT32, True)
    return kind


def trains_in_float32(module: N) -> N:
    """Tags a module whose parameters are read in float32 under autocast, too, and so are gathered in it; to sample they
    may be cast."""
    setattr(module, _FLOAT32_IN_TRAINING, True)
    return module


def is_float32(module: nn.Module, training: bool = False) -> bool:
    """Whether a module's own parameters stay float32: always, or at least in training."""
    return bool(getattr(module, _FLOAT32, False) or training and getattr(module, _FLOAT32_IN_TRAINING, False))


@stays_float32
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv 1910.07467); computed in float32 at least, given in x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """silu(x W_gate) * (x W_up) W_down without biases (arXiv 2002.05202, eq. 6)."""

    wants_fp8 = as_its("in_proj")

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*any d"] | Quantized) -> Float[Tensor, "*any d"]:
        gate_up = self.in_proj(x)
        return self.out_proj(swiglu(gate_up, dtype=input_dtype(self.out_proj, gate_up)))


def undecayed(parameter: P) -> P:
    """The parameter, with a tag that keeps weight decay away from it: mamba_ssm's, `_no_weight_decay`, so that modules
    from there are understood, too. Parameters of fewer than two axes need none (`decays`)."""
    setattr(parameter, _UNDECAYED, True)
    return parameter


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay pulls at a parameter: matrices and the weights of convolutions, unless tagged."""
    return parameter.ndim >= 2 and not getattr(parameter, _UNDECAYED, False)


def head_count(dim: int, num_heads: int | None) -> int:
    """Number of heads; None takes the widest heads among 128, 64, ..., 8 that give two or more, else one head [ours].
    Raises SettingError where `num_heads` does not divide `dim`."""
    if num_heads is None:
        return next((dim // e for e in (128, 64, 32, 16, 8) if dim % e == 0 and dim >= 2 * e), 1)
    if dim % num_heads:
        fits = [str(k) for k in range(1, dim + 1) if dim % k == 0]
        told = f"num_heads={num_heads} does not divide the width {dim}; choose one of "
        raise SettingError("num_heads", told + ", ".join(fits[:8]) + (", ..." if len(fits) > 8 else "") + ".")
    return num_heads


def grid_of(x: Shaped[Tensor, "b t h w d"]) -> Triple:
    """Number of tokens along t, h and w."""
    _, t, h, w, _ = x.shape
    return t, h, w


def cut_patches(x: Float[Tensor, "b c t h w"], patch: Triple) -> Float[Tensor, "b _t _h _w p"]:
    """The numbers of each patch side by side, channel first; the patch divides t, h and w."""
    x = x.unflatten(4, (-1, patch[2])).unflatten(3, (-1, patch[1])).unflatten(2, (-1, patch[0]))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def join_patches(x: Float[Tensor, "b t h w p"], patch: Triple) -> Float[Tensor, "b _c _t _h _w"]:
    """The inverse of `cut_patches`."""
    x = x.unflatten(4, (-1, *patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def clamp(sizes: Triple, grid: Triple) -> Triple:
    """Sizes of a window or kernel that are no larger than the grid."""
    t, h, w = map(min, sizes, grid)
    return t, h, w
