"""Matrix products in 8 bits, for sampling: 8-bit tensors, their product, and the layer that replaces nn.Linear.

float8_e4m3fn has 3 bits of mantissa and reaches 448, so each row carries a float32 scale: one for each token of the
activations, one for each output channel of the weights (W8A8 per token and per channel, as in SmoothQuant, arXiv
2211.10438, section 2). A product is then one 8-bit GEMM whose result is scaled by rows and columns."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lingen.kernels.choice import choose
from lingen.recipe.errors import RecipeError

FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448.0
"""Largest number of float8_e4m3fn."""
SMALLEST_ROW = 1e-12
"""Floor of a row's largest value: a row of zeros stays zeros."""
SMALLEST_LAYER = 1024
"""Least in_features and out_features of a layer that multiplies in 8 bits [ours]: smaller ones cost little time, and
quantising their input takes longer than the product saves."""


class Quantized(NamedTuple):
    """Rows of 8-bit numbers, which stand for values * scale."""

    values: Float[Tensor, "*rows d"]
    """float8_e4m3fn."""
    scale: Float[Tensor, "*rows 1"]
    """float32."""

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*rows d"]:
        """values * scale, multiplied in float32."""
        return (self.values.float() * self.scale).to(dtype)


def quantize(x: Float[Tensor, "*rows d"], *, kernel: str = "auto") -> Quantized:
    """Each row divided by its scale, largest absolute value / 448, and rounded to the nearest. kernel: "reference"
    (plain PyTorch) or "triton". Raises RecipeError for one that cannot run."""
    if choose("quantization", kernel, x) == "triton":
        from lingen.kernels import fp8_triton

        return Quantized(*fp8_triton.quantize(x))
    high = x.float()
    scale = high.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ROW) / LARGEST_FLOAT8
    return Quantized((high / scale).to(FLOAT8), scale)


def product(
    x: Quantized, weight: Quantized, bias: Float[Tensor, "o"] | None = None, *, kernel: str = "auto"
) -> Float[Tensor, "*rows o"]:
    """x weight^T + bias in bfloat16, for x [*rows i] and weight [o i]. kernel: "scaled_mm" is `torch._scaled_mm` with
    scales by rows, on CUDA; it wants i and o to be multiples of 16. "reference" multiplies the dequantised numbers in
    float32. "auto" is the first on CUDA, else the second."""
    fast = choose("8-bit product", kernel, x.values, plain="scaled_mm" if x.values.is_cuda else "reference")
    if fast == "reference":
        wide = None if bias is None else bias.float()
        return F.linear(x.dequantize(), weight.dequantize(), wide).to(torch.bfloat16)
    out = torch._scaled_mm(
        x.values.flatten(0, -2), weight.values.t(), scale_a=x.scale.flatten(0, -2), scale_b=weight.scale.t(), bias=bias,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return out.view(*x.shape[:-1], -1)


class Fp8Linear(nn.Module):
    """A linear layer with float8_e4m3fn weights and one scale for each output channel; no gradients. Takes plain
    tensors, which it quantises, or `Quantized` ones; returns bfloat16."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values, scale = quantize(linear.weight.detach(), kernel="reference")
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, x: Float[Tensor, "*rows i"] | Quantized) -> Float[Tensor, "*rows o"]:
        rows = x if isinstance(x, Quantized) else quantize(x)
        return product(rows, Quantized(self.values, self.scale), self.bias)

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The dequantised weights in bfloat16, for code that multiplies by them without calling the layer."""
        return Quantized(self.values, self.scale).dequantize(torch.bfloat16)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def wants_fp8(module: object) -> bool:
    """Whether the module takes a `Quantized` in place of a tensor: an `Fp8Linear`, or a module whose own `wants_fp8` is
    true because its first layers are such. A mixer without that property gets a plain tensor."""
    return isinstance(module, Fp8Linear) or getattr(module, "wants_fp8", False) is True


def as_its(layer: str) -> property:
    """The `wants_fp8` of a class of modules: that of its layer of this name, which reads the input."""
    return property(lambda self: wants_fp8(getattr(self, layer)))


def input_dtype(module: object, x: Tensor) -> torch.dtype:
    """The dtype in which `module` wants its input: `FLOAT8` for a `Quantized`, else autocast's dtype or that of x."""
    kind = x.device.type
    if wants_fp8(module):
        return FLOAT8
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def takes_part(layer: nn.Module) -> bool:
    """Whether a layer is to multiply in 8 bits: an nn.Linear whose widths are both at least 1,024 [ours] and multiples
    of 16, as the product needs. Subclasses stay as they are: they may use their weight in other ways."""
    if type(layer) is not nn.Linear:
        return False
    widths = (layer.in_features, layer.out_features)
    return min(widths) >= SMALLEST_LAYER and not any(width % 16 for width in widths)


def to_fp8(model: nn.Module) -> list[str]:
    """Turns the layers that `takes_part` names into `Fp8Linear`, in place; returns their names. RecipeError on a GPU
    without 8-bit products."""
    layers = {name: layer for name, layer in model.named_modules() if takes_part(layer)}
    for device in {layer.weight.device for layer in layers.values() if isinstance(layer.weight, Tensor)}:
        check_device(device)
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, Fp8Linear(layer))
    return list(layers)


def check_no_gradient(dtype: torch.dtype | None, *tensors: Tensor | None) -> None:
    """ValueError where 8-bit results of tensors that require a gradient are asked for: no gradient passes through."""
    if dtype == FLOAT8 and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError("8-bit results carry no gradient; ask for them under torch.no_grad().")


def check_device(device: torch.device) -> None:
    """RecipeError for a GPU that cannot multiply float8."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise RecipeError(
            f"sample.precision=fp8 needs a GPU of compute capability 8.9 or more; {torch.cuda.get_device_name(device)} "
            f"has {major}.{minor}. Use sample.precision=bf16-true."
        )
