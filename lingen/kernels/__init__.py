"""One function per operation; `kernel=` picks among its twins: plain PyTorch, Triton, another library's.

The Triton twin of OP lives in OP_triton.py and is imported when it is chosen: Triton does not exist on every system.
"""

from lingen.kernels.attention import ATTENTION_KERNELS, attention
from lingen.kernels.conv import conv_silu
from lingen.kernels.cross_attention import cross_attention
from lingen.kernels.gated_norm import gated_norm
from lingen.kernels.modulate import add_norm, gated_add, norm_modulate
from lingen.kernels.pool import pool
from lingen.kernels.scan import SCAN_KERNELS, scan, scan_state
from lingen.kernels.ssd import SSD_KERNELS, ssd
from lingen.kernels.swiglu import swiglu
from lingen.kernels.window_attention import WINDOW_KERNELS, window_attention

__all__ = [
    "ATTENTION_KERNELS",
    "SCAN_KERNELS",
    "SSD_KERNELS",
    "WINDOW_KERNELS",
    "add_norm",
    "attention",
    "conv_silu",
    "cross_attention",
    "gated_add",
    "gated_norm",
    "norm_modulate",
    "pool",
    "scan",
    "scan_state",
    "ssd",
    "swiglu",
    "window_attention",
]
