"""What blocks keep for the backward pass, and which of them are computed again instead."""

from lingen.blocks.block import mixer_name, mixers_of
from lingen.recipe.sections import LinGenConfig

KEPT_BYTES = {
    "cpu": {"mate": 460, "mamba2": 400, "temporal_swin": 170, "attention": 145, "linear_attention": 160},
    "cuda": {"mate": 122, "mamba2": 106, "temporal_swin": 88, "attention": 104},
}
"""What a block of this mixer keeps for the backward pass in float32, in bytes per token and unit of width, by the type
of device: tensors that autograd saved, at width 256 and 1,024, with plain PyTorch on a CPU and the Triton kernels on an
H200 [ours]. Other devices count as a CPU, mixers of third parties as the largest entry."""
SIXTEEN_BIT = {"cpu": 0.85, "cuda": 0.6}
"""The factor on it in 16 bits: with plain PyTorch the SSD's sums stay float32, on CUDA the residual stream does."""
INPUT_BYTES = 4
"""Bytes of each number of a recomputed block's input: the residual stream is float32 in training."""


def recomputed_blocks(config: LinGenConfig, tokens: int, sixteen_bit: bool, device: str = "cpu") -> int:
    """How many blocks, from the first on, keep only their input and are computed again in the backward pass.

    `checkpointing` true is all and false none; a number of GiB is the fewest with which the activations fit into it, or
    all but the last, where even that is too much: the last one would be computed again at once, and save nothing.

    Args:
        tokens: of all samples of the batch on this rank.
        sixteen_bit: whether matrix products are done in 16 bits.
        device: type of the device."""
    if isinstance(config.checkpointing, bool):
        return config.depth if config.checkpointing else 0
    target = config.checkpointing * 2**30
    fits = (k for k in range(config.depth) if activation_bytes(config, tokens, k, sixteen_bit, device) <= target)
    return next(fits, config.depth - 1)


def activation_bytes(config: LinGenConfig, tokens: int, recomputed: int, sixteen_bit: bool, device: str = "cpu") -> int:
    """What the blocks keep for the backward pass at its peak, where the first `recomputed` of them keep their input.

    The backward pass begins with the last block. By the time that the first ones are computed again, one by one, what
    the others kept is gone; so recomputing the first ones costs nothing on top, and the peak is either the one or the
    other."""
    table = KEPT_BYTES.get(device, KEPT_BYTES["cpu"])
    share = SIXTEEN_BIT.get(device, SIXTEEN_BIT["cpu"]) if sixteen_bit else 1
    blocks = [share * table.get(mixer_name(mixer), max(table.values())) for mixer, _ in mixers_of(config)]
    inside = max(sum(blocks[recomputed:]), *blocks[:recomputed], 0)
    return int(tokens * config.dim * (INPUT_BYTES * recomputed + inside))
