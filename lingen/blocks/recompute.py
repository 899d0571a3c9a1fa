"""What blocks keep for the backward pass, and which of them are computed again instead."""

from collections.abc import Sequence

from lingen.blocks.block import mixer_name, mixers_of
from lingen.kernels.kept import ALL, INPUT, NARROW, PRODUCTS
from lingen.recipe.sections import LinGenConfig

KEPT_BYTES = {
    "cpu": {
        "mate": (20, 70, 460), "mamba2": (16, 54, 400), "temporal_swin": (16, 50, 170), "attention": (16, 50, 145),
        "linear_attention": (16, 50, 160),
    },
    "cuda": {"mate": (28, 78, 122), "mamba2": (24, 62, 106), "temporal_swin": (16, 50, 88), "attention": (16, 50, 104)},
}  # fmt: skip
"""What a block of this mixer keeps in float32, in bytes per token and unit of width, by the type of device: beside its
input the results of NARROW and of PRODUCTS, by their widths, and ALL, tensors that autograd saved, at width 256 and
1,024, with plain PyTorch on a CPU and the Triton kernels on an H200 [ours]. Other devices count as a CPU, mixers of
third parties as the largest entry."""
SIXTEEN_BIT = {"cpu": 0.85, "cuda": 0.6}
"""The factor on ALL in 16 bits: with plain PyTorch the SSD's sums stay float32, on CUDA the residual stream does."""
AT_WORK = 1.2
"""The factor on what a block keeps while its gradients are computed [ours]."""
INPUT_BYTES = 4
"""Bytes of each number of a recomputed block's input: the residual stream is float32 in training."""


def kept_by_blocks(config: LinGenConfig, tokens: int, sixteen_bit: bool, device: str = "cpu") -> list[int]:
    """The level (`INPUT` to `ALL`) of what each block keeps.

    `checkpointing` true is all inputs and false everything. With a number of GiB blocks keep what fits: the last one
    everything, since it would be computed again at once and save nothing; of the others, last ones first, each rises to
    a level before any rises to the next, since a level saves more time for its bytes than the next one.

    Args:
        tokens: of all samples of the batch on this rank.
        sixteen_bit: whether matrix products are done in 16 bits.
        device: type of the device."""
    if isinstance(config.checkpointing, bool):
        return [INPUT if config.checkpointing else ALL] * config.depth
    levels = [*[INPUT] * (config.depth - 1), ALL]
    for level in (NARROW, PRODUCTS, ALL):
        for index in reversed(range(config.depth - 1)):
            raised = [*levels[:index], level, *levels[index + 1 :]]
            if activation_bytes(config, tokens, raised, sixteen_bit, device) > config.checkpointing * 2**30:
                return levels
            levels = raised
    return levels


def activation_bytes(
    config: LinGenConfig, tokens: int, levels: Sequence[int], sixteen_bit: bool, device: str = "cpu"
) -> int:
    """What the blocks keep for the backward pass at its peak.

    It begins with the last block. While one is computed again, all of it is there beside what those before it keep, and
    what those behind it kept is gone."""
    table = KEPT_BYTES.get(device, KEPT_BYTES["cpu"])
    low, high = (0.5, SIXTEEN_BIT.get(device, SIXTEEN_BIT["cpu"])) if sixteen_bit else (1, 1)
    before = most = 0.0
    for (mixer, _), level in zip(mixers_of(config), levels, strict=True):
        narrow, products, everything = table.get(mixer_name(mixer), max(table.values()))
        entry = INPUT_BYTES if level < ALL else 0
        most = max(most, before + entry + AT_WORK * high * everything)
        before += entry + (0, low * narrow, low * products, high * everything)[level]
    return int(tokens * config.dim * most)
