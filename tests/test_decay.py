"""Weight decay: said where a parameter is born, and the same parameters in the same order as by the list of types."""

import pytest
import torch
from torch import nn

from lingen.blocks.layers import decays, undecayed
from lingen.recipe import load_recipe, load_stages
from lingen.recipe.reading import shipped_recipes
from lingen.training.autoencoder import AutoencoderModule
from lingen.training.base import Trained
from lingen.training.denoiser import LinGenModule

MIXERS = "model.mixer=[attention, linear_attention, {name: mate, branch_gate: each}, temporal_swin, mamba2]"
CASES = [(name, ()) for name in shipped_recipes()] + [("quickstart_cpu", ("text=bytes",)), ("footage_64", (MIXERS,))]


def by_types(module: Trained) -> list[list[str]]:
    """Names in both groups by the rule that the checkpoints of earlier versions were written with."""
    linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    decayed = {id(layer.weight) for layer in module.modules() if isinstance(layer, linear)}
    trained = module.trained_parameters().items()
    return [[name for name, p in trained if (id(p) in decayed) == decay] for decay in (True, False)]


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=str)
def test_the_groups_are_those_of_earlier_checkpoints(name, overrides):
    for recipe in load_stages(name, overrides):
        with torch.device("meta"):
            module = (AutoencoderModule if recipe.trains == "autoencoder" else LinGenModule)(recipe)
        names = {id(parameter): key for key, parameter in module.named_parameters()}
        groups = Trained.parameter_groups(module)
        assert [[names[id(p)] for p in group["params"]] for group in groups] == by_types(module)
        assert [group["weight_decay"] for group in groups] == [recipe.train.weight_decay, 0.0]


class Someones(nn.Module):
    """A third party's mixer: a matrix without a tag, one with it, and one with mamba_ssm's."""

    def __init__(self, dim, layer):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(dim, dim))
        self.table = undecayed(nn.Parameter(torch.randn(dim, dim)))
        self.theirs = nn.Parameter(torch.randn(dim, dim))
        self.theirs._no_weight_decay = True
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x @ (self.matrix + self.table + self.theirs) * self.gain


def test_a_third_partys_matrices_decay_unless_they_are_tagged():
    recipe = load_recipe("quickstart_cpu", [f"model.mixer={__name__}:Someones"], stage="videos")
    module = LinGenModule(recipe)
    mine = {name.rpartition(".")[2] for name in module.decayed if ".mixer." in name}
    assert mine == {"matrix"}
    # What a strategy does to parameters later, such as one flat piece of each, changes nothing.
    for block in module.model.blocks:
        block.mixer.matrix = nn.Parameter(block.mixer.matrix.detach().flatten())
        assert not decays(block.mixer.matrix)
    decayed = {id(p) for p in module.parameter_groups()[0]["params"]}
    assert all(id(block.mixer.matrix) in decayed for block in module.model.blocks)
