"""A recipe on the meta device: whether its parts are right, and what they will take."""

GPUS = {
    "h100-80": ("H100", 79.1), "h200": ("H200", 139.8), "b200": ("B200", 178.4), "a100-80": ("A100", 79.1),
    "a100-40": ("A100", 39.4), "l40s": ("L40S", 44.4), "rtx-4090": ("RTX 4090", 23.5),
}  # fmt: skip
"""Name -> its key in `forecast.PEAK_FLOPS`, and GiB of memory as torch sees them."""
