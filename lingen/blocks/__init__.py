"""The parts of a layer: token mixers, scan orders and small layers."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from lingen.kernels.fp8 import Quantized


@runtime_checkable
class Mixer(Protocol):
    """What the registry MIXERS holds: an `nn.Module` that mixes the tokens of a clip. There is no base class.

    It is built as ``Mixer(dim, layer, *, settings...)``. `dim` is the width of a token; `layer` counts the model's
    layers of the same mixer and picks, say, a scan order or a shift. Settings are keyword-only arguments with a type
    and mostly a default, and no ``**kwargs``: from them a recipe is checked, filled in and documented. A constructor
    refuses a value with `SettingError`, and runs on the meta device.

    What it owes:
        - Calling it keeps the shape; an image is t = 1. The grid is read off the shape, and no sample sees another.
        - It runs on the meta device and under FakeTensorMode, forward and backward, without looking at numbers: sizes
          and FLOPs are planned there. torch's own products (linear layers, matmul, convolutions, attention) are
          counted by themselves. A kernel of your own has a plain form where ``x.is_meta``, or is a
          `torch.library.custom_op` with `register_fake` and `torch.utils.flop_counter.register_flop_formula`. If it
          fails there, it trains all the same, but FLOPs and MFU are unknown, and a warning says so.
        - It says which parameters weight decay leaves alone: see `lingen.blocks.layers.undecayed`. Parameters for which
          bfloat16 is too coarse live in modules that say so (`lingen.blocks.layers.stays_float32`).

    What it may offer, each by an attribute of this name, and does without:
        ``wants_fp8``: a property that is true when its first layers have become `Fp8Linear`; the input is then a
            `lingen.kernels.fp8.Quantized`, whose `shape` is that of x.
        ``adds_onto = True``: ``mixer(x, onto=y)`` gives y + mixer(x) and may overwrite y where no gradient is wanted.
            Used for a TE-branch when sampling.
        ``horizon()``: tokens over which it remembers, as a tensor whose mean is logged; at the start and in training,
            of every module inside the mixer that has it.
        ``kernel``: name of the twin that runs; "auto" must be among its values, and is set while MATE measures its
            branches, on whatever device it is built.
        ``cuda_only = True``: it runs on CUDA alone, as a layer of Triton kernels does; where there is no GPU, a recipe
            is then checked without trying it.
        ``tile(grid)``: the part of a grid that it treats like the whole, such as a window; MATE measures on one.
        ``out_proj``: a layer whose `weight` scales the output; MATE gives its branches equal size by that of `te`."""

    def __call__(self, x: Float[Tensor, "b t h w d"] | Quantized, /) -> Float[Tensor, "b t h w d"]:
        """Of a normed x in autocast's dtype; `Quantized` only where `wants_fp8` is true."""
        ...
