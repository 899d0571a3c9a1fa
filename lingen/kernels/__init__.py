"""One function per operation; `kernel=` picks among its twins (plain PyTorch, stock library)."""

from lingen.kernels.attention import ATTENTION_KERNELS, attention
from lingen.kernels.ssd import SSD_KERNELS, ssd, ssd_state

__all__ = ["ATTENTION_KERNELS", "SSD_KERNELS", "attention", "ssd", "ssd_state"]
