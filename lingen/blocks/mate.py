"""MATE, LinGen's token mixer: an MA-branch and a TE-branch side by side (arXiv 2412.09856, Figure 2)."""

import math
from typing import Annotated, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lingen.blocks import Mixer
from lingen.blocks.mamba2 import Mamba2
from lingen.blocks.temporal_swin import TemporalSwin
from lingen.kernels.choice import holds_numbers
from lingen.kernels.fp8 import wants_fp8
from lingen.recipe.bounds import IDENTITY
from lingen.recipe.errors import SettingError
from lingen.recipe.passed_on import passes_on
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import Triple
from lingen.recipe.signature import check_value, checked, settings_of

# Largest grid of the probe, and that of a TE-branch without tiles: larger ones cost time and give the same scale.
_PROBE_GRID, _UNTILED_GRID = (8, 8, 8), (8, 4, 4)
# Random numbers in the probe: as many clips as it takes to know the RMS of a narrow model to a few per cent.
_PROBE_NUMBERS = 65_536


@checked
@passes_on(Mamba2, TemporalSwin)
class MATE(nn.Module):
    """mate(x) = mate.ma(x) + mate.te(x): bidirectional Mamba2 with review tokens, plus windowed attention; linear.

    Its settings are also those of `Mamba2` and `TemporalSwin`, declared there (`passes_on`) and written flat; a branch
    is given those that its signature names (`kernel`: only where it is one of the branch's choices, else the branch
    stays at its default).
    Both branches start at the same output RMS [ours; at init the MA-branch is else up to 10x the TE-branch]: the
    output projection of `te` is rescaled by a seeded probe. Not so where nothing is computed (meta, FakeTensorMode),
    where a branch is switched off, or where `te` has no `out_proj.weight`.
    Raises SettingError.

    Settings:
        ma, te: any mixer, by name or as a mapping with `name` and its own settings (which win over the flat ones);
            null switches the branch off.
        branch_gate: "shared" is the plain sum (the paper: one gate, the block's); "each" gives each branch a learned
            gain per channel that starts at 1 [ours]."""

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        ma: Annotated[str | dict[str, Any] | None, IDENTITY] = "mamba2",
        te: Annotated[str | dict[str, Any] | None, IDENTITY] = "temporal_swin",
        branch_gate: Annotated[Literal["shared", "each"], IDENTITY] = "shared",
        flat: dict[str, Any],
    ):
        super().__init__()
        if ma is None and te is None:
            raise SettingError("ma", "ma and te are both null: nothing is left of MATE. Switch off one branch at most.")
        # `num_heads` is meant for the TE-branch, whatever the other one is.
        of_ma = {setting: value for setting, value in flat.items() if setting != "num_heads"}
        branches, kernel = [_component(ma, of_ma), _component(te, flat)], flat["kernel"]
        if kernel != "auto" and all(branch.get("kernel") != kernel for branch in branches):
            raise SettingError("kernel", f"kernel={kernel!r} is offered by no branch that is switched on.")
        self.ma: Mixer | None
        self.te: Mixer | None
        self.ma, self.te = (MIXERS.build(branch, dim, layer) if branch else None for branch in branches)
        self.ma_gain = self.te_gain = None
        if self.ma is not None and self.te is not None:
            _equalise(cast(nn.Module, self.ma), cast(nn.Module, self.te), dim)
            if branch_gate == "each":
                self.ma_gain, self.te_gain = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b t h w d"]:
        if self.ma is None or self.te is None:
            only = self.ma or self.te
            assert only is not None
            return only(x)
        ma = self.ma(x)
        if self.ma_gain is not None and self.te_gain is not None:
            return ma * self.ma_gain.to(ma.dtype) + self.te(x) * self.te_gain.to(ma.dtype)
        if getattr(self.te, "adds_onto", False) and not torch.is_grad_enabled():
            return cast(Any, self.te)(x, onto=ma)  # in training, callbacks log each branch's own output
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


def _equalise(ma: nn.Module, te: nn.Module, dim: int) -> None:
    """Rescales te.out_proj so that both branches give the same RMS on random tokens of unit RMS."""
    weight = getattr(getattr(te, "out_proj", None), "weight", None)
    if weight is None or not all(map(holds_numbers, (*ma.parameters(), *te.parameters()))):
        return
    device, tile = weight.device, getattr(te, "tile", None)
    grid: Triple = _UNTILED_GRID if tile is None else tile(_PROBE_GRID)
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
