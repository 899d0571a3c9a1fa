"""MATE, LinGen's token mixer: an MA-branch and a TE-branch side by side (arXiv 2412.09856, Figure 2)."""

import inspect
import math
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lingen.blocks.layers import clamp
from lingen.kernels.choice import holds_numbers
from lingen.kernels.fp8 import wants_fp8
from lingen.recipe.bounds import FREE, IDENTITY
from lingen.recipe.errors import SettingError
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import Triple
from lingen.recipe.signature import check_value, checked, settings_of

# Largest grid of the probe: larger ones cost time and give the same scale.
_PROBE_GRID = (8, 8, 8)
# Random numbers in the probe: as many clips as it takes to know the RMS of a narrow model to a few per cent.
_PROBE_NUMBERS = 65_536


@checked
class MATE(nn.Module):
    """mate(x) = mate.ma(x) + mate.te(x): bidirectional Mamba2 with review tokens, plus windowed attention; linear.

    The settings are those of `Mamba2` and `TemporalSwin`, flat, with the same defaults; a branch is given those that
    its signature names (`kernel`: only where it is one of the branch's choices, else the branch stays at its default).
    Both branches start at the same output RMS [ours; at init the MA-branch is else up to 10x the TE-branch]: the
    output projection of `te` is rescaled by a seeded probe. Not so where nothing is computed (meta, FakeTensorMode),
    where a branch is switched off, or where `te` has no `out_proj.weight`.
    Raises SettingError.

    Settings:
        ma, te: any mixer, by name or as a mapping with `name` and its own settings (which win over the flat ones);
            null switches the branch off.
        branch_gate: "shared" is the plain sum (the paper: one gate, the block's); "each" gives each branch a learned
            gain per channel that starts at 1 [ours].
    """

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        ma: Annotated[str | dict[str, Any] | None, IDENTITY] = "mamba2",
        te: Annotated[str | dict[str, Any] | None, IDENTITY] = "temporal_swin",
        branch_gate: Annotated[Literal["shared", "each"], IDENTITY] = "shared",
        scan: Annotated[str, IDENTITY] = "rotary_major",
        state_dim: Annotated[int, IDENTITY] = 128,
        head_dim: Annotated[int, IDENTITY] = 64,
        groups: Annotated[int, IDENTITY] = 1,
        expand: Annotated[int, IDENTITY] = 2,
        dt_min: Annotated[float, IDENTITY] = 1e-3,
        dt_max: Annotated[float, IDENTITY] = 0.1,
        conv: Annotated[Literal["shared", "per_direction"], IDENTITY] = "shared",
        conv_width: Annotated[int, IDENTITY] = 4,
        review: Annotated[tuple[int, int, int] | None, IDENTITY] = (2, 2, 2),
        review_reverse: Annotated[Literal["front", "plain"], IDENTITY] = "front",
        bidirectional: Annotated[bool, IDENTITY] = True,
        window: Annotated[tuple[int, int, int], IDENTITY] = (8, 4, 4),
        num_heads: Annotated[int | None, IDENTITY] = None,
        kernel: Annotated[Literal["auto", "reference", "chunked", "triton", "stock", "sdpa", "flash"], FREE] = "auto",
    ):
        super().__init__()
        if ma is None and te is None:
            raise SettingError("ma", "ma and te are both null: nothing is left of MATE. Switch off one branch at most.")
        flat = {
            "scan": scan, "state_dim": state_dim, "head_dim": head_dim, "groups": groups, "expand": expand,
            "dt_min": dt_min, "dt_max": dt_max, "conv": conv, "conv_width": conv_width, "review": review,
            "review_reverse": review_reverse, "bidirectional": bidirectional, "window": window, "kernel": kernel,
        }  # fmt: skip
        branches = {"ma": _component(ma, flat), "te": _component(te, flat | {"num_heads": num_heads})}
        if kernel != "auto" and all(branch.get("kernel") != kernel for branch in branches.values()):
            raise SettingError("kernel", f"kernel={kernel!r} is offered by no branch that is switched on.")
        self.ma, self.te = (MIXERS.build(branch, dim, layer) if branch else None for branch in branches.values())
        self.ma_gain = self.te_gain = None
        if self.ma is not None and self.te is not None:
            _equalise(self.ma, self.te, clamp(window, _PROBE_GRID), dim)
            if branch_gate == "each":
                self.ma_gain, self.te_gain = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self._te_adds = self.te is not None and "onto" in inspect.signature(self.te.forward).parameters

    def forward(self, x: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b t h w d"]:
        if self.ma is None or self.te is None:
            only = self.ma or self.te
            assert only is not None
            return only(x)
        ma = self.ma(x)
        if self.ma_gain is not None and self.te_gain is not None:
            return ma * self.ma_gain.to(ma.dtype) + self.te(x) * self.te_gain.to(ma.dtype)
        if self._te_adds and not torch.is_grad_enabled():
            return self.te(x, onto=ma)  # in training, callbacks log each branch's own output
        return ma + self.te(x)

    @property
    def wants_fp8(self) -> bool:
        """Whether all branches take a `Quantized` input, see `lingen.kernels.fp8`."""
        return all(wants_fp8(branch) for branch in (self.ma, self.te) if branch is not None)


def _component(component: str | dict[str, Any] | None, flat: dict[str, Any]) -> dict[str, Any]:
    """The branch as MIXERS.build takes it: its own settings over the flat ones that its signature names."""
    if component is None:
        return {}
    own = {"name": component} if isinstance(component, str) else dict(component)
    known = settings_of(MIXERS[own.get("name", "")])
    given = {setting: value for setting, value in flat.items() if setting in known}
    if "kernel" in known and check_value(flat["kernel"], known["kernel"].hint)[1]:
        del given["kernel"]
    return given | own


def _equalise(ma: nn.Module, te: nn.Module, grid: Triple, dim: int) -> None:
    """Rescales te.out_proj so that both branches give the same RMS on random tokens of unit RMS."""
    weight = getattr(getattr(te, "out_proj", None), "weight", None)
    if weight is None or not all(map(holds_numbers, (*ma.parameters(), *te.parameters()))):
        return
    device = weight.device
    generator = torch.Generator(device).manual_seed(0)
    clips = -(-_PROBE_NUMBERS // (math.prod(grid) * dim))
    probe = torch.randn(clips, *grid, dim, generator=generator, device=device, dtype=weight.dtype)
    # A third party's mixer may draw random numbers; the caller's random state is restored.
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        ratio = _output_rms(ma, probe) / _output_rms(te, probe)
        if 0 < ratio < float("inf"):
            weight.mul_(ratio)


def _output_rms(branch: Any, x: Tensor) -> float:
    """RMS of the branch's output, with kernel "auto": a model is built on the CPU, where its own kernel may not run."""
    kernel = getattr(branch, "kernel", None)
    if kernel is not None:
        branch.kernel = "auto"
    rms = branch(x).double().square().mean().sqrt().item()
    if kernel is not None:
        branch.kernel = kernel
    return rms
