"""Registries: the three doors for a third party, what a broken or greedy plugin does, and a real installed package."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import pytest
import torch
from torch import Tensor, nn

from lingen.recipe import load_recipe
from lingen.recipe.bounds import Above, AtLeast, Finite
from lingen.recipe.errors import RecipeError, SettingError
from lingen.recipe.registry import AUTOENCODERS, COMPONENTS, MIXERS, SCANS, TEXT_ENCODERS, Registry
from lingen.recipe.signature import bounds_of, settings_of
from tests.helpers.commands import ROOT, run_command, run_python

PLUGIN = '''\
"""A package of its own that brings a mixer and a scan order."""

import torch
from torch import nn


class Gain(nn.Module):
    """Every token times one learned gain."""

    def __init__(self, dim: int, layer: int, *, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), gain))

    def forward(self, x):
        return x * self.weight


def backwards(t: int, h: int, w: int) -> torch.Tensor:
    """The raster order, last token first."""
    return torch.arange(t * h * w).flip(0)
'''
RECIPE = """\
model: {dim: 32, depth: 2, mixer: {name: gain, gain: 2}, patch: [1, 4, 4]}
data: {synthetic: shapes, frames: 4, size: [16, 16]}
"""


class Mine(nn.Module):
    """A mixer of a test."""

    def __init__(self, dim: int, layer: int, *, gain: float = 1.0, window: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.gain, self.window = gain, window

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@pytest.fixture
def registry() -> Registry:
    return Registry("mixer", "lingen.tests", {"mine": Mine, "late": f"{__name__}:Mine"})


def package(folder: Path, name: str, points: dict[str, dict[str, str]], source: str = PLUGIN) -> Path:
    """An installed package, as pip leaves it: a module and its .dist-info with entry points."""
    module = name.replace("-", "_")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in points.items())
    (info / "entry_points.txt").write_text("\n".join(groups))
    return folder


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder for packages that is on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_build_checks_settings_against_the_signature(registry):
    built = registry.build({"name": "mine", "gain": 2, "window": [1, 2, 3]}, 8, 0)
    assert built.gain == 2.0 and built.window == (1, 2, 3)
    assert registry.build("late", 8, 0).window == (1, 1, 1)
    with pytest.raises(RecipeError, match="^Key 'gian' not in 'Mine'. Did you mean 'gain'\\? \\(at gian of mixer"):
        registry.build({"name": "mine", "gian": 2}, 8, 0)
    with pytest.raises(RecipeError, match="^Expected 3 whole numbers, got 2. \\(at window of mixer 'mine'\\)$"):
        registry.build({"name": "mine", "window": [1, 2]}, 8, 0)
    with pytest.raises(RecipeError, match="named by a word, got None"):
        registry.build({"gain": 2}, 8, 0)


def test_unknown_name(registry):
    with pytest.raises(RecipeError) as caught:
        registry["mien"]
    assert str(caught.value) == (
        "There is no mixer called 'mien'. Did you mean 'mine'? Known: late, mine. "
        "To use your own, write 'module:Class'."
    )


def test_the_decorator(registry):
    registry.register("other")(Mine)
    assert registry["other"] is Mine and registry.origin("other") == __name__ and "other" in registry
    with pytest.raises(ValueError, match="The mixer 'other' exists already, from .*; choose another name."):
        registry.register("other")(Mine)
    with pytest.raises(ValueError, match="cannot hold ':'"):
        registry.register("a:b")(Mine)


def test_module_and_class(registry, site):
    (site / "my_file.py").write_text(PLUGIN)
    assert registry.build({"name": "my_file:Gain", "gain": 3}, 4, 0)(torch.ones(1, 1, 1, 1, 4)).sum() == 12
    with pytest.raises(RecipeError, match="Cannot load 'my_file:Gian': AttributeError"):
        registry["my_file:Gian"]
    (site / "broken_file.py").write_text("1 / 0")
    with pytest.raises(RecipeError, match="Cannot load 'broken_file:X': ZeroDivisionError: division by zero"):
        registry["broken_file:X"]


def test_entry_points_are_looked_up_without_importing_others(registry, site):
    package(site, "good-part", {"lingen.tests": {"gain": "good_part:Gain"}})
    package(site, "broken-part", {"lingen.tests": {"oops": "broken_part:X"}}, source="raise OSError('no such device')")
    assert registry.names() == ["gain", "late", "mine", "oops"] and registry.origin("gain") == "good-part"
    assert registry["gain"].__name__ == "Gain" and "broken_part" not in sys.modules
    with pytest.raises(RecipeError, match="Cannot load 'broken_part:X': OSError: no such device"):
        registry["oops"]


def test_two_packages_that_claim_one_name(registry, site):
    package(site, "first-part", {"lingen.tests": {"gain": "first_part:Gain"}})
    package(site, "second-part", {"lingen.tests": {"gain": "second_part:Gain"}})
    with pytest.raises(
        RecipeError, match="The mixer 'gain' comes from (first|second)-part and (first|second)-part. Uninstall"
    ):
        registry["gain"]
    assert registry["mine"] is Mine
    assert registry["first_part:Gain"].__name__ == "Gain"


def test_a_builtin_name_cannot_be_taken_over(registry, site):
    package(site, "greedy-part", {"lingen.tests": {"mine": "greedy_part:Gain"}})
    assert registry["mine"] is Mine and registry.origin("mine") == "lingen"
    assert registry.refused() == [("mine", "greedy-part", "The name 'mine' belongs to lingen; choose another one.")]


def test_list_shows_broken_plugins_as_rows(site):
    package(site, "good-part", {"lingen.mixers": {"gain": "good_part:Gain"}})
    package(site, "broken-part", {"lingen.mixers": {"oops": "broken_part:X"}}, source="raise OSError('no device')")
    package(site, "greedy-part", {"lingen.mixers": {"mate": "greedy_part:Gain"}})
    rows = list_rows("mixers", site)
    by_name = {(row["name"], row["origin"]): row for row in rows}
    assert by_name["gain", "good-part"]["settings"] == {"gain": 1.0}
    assert by_name["gain", "good-part"]["about"] == "Every token times one learned gain."
    assert by_name["oops", "broken-part"]["error"] == "Cannot load 'broken_part:X': OSError: no device"
    assert by_name["mate", "greedy-part"]["error"] == "The name 'mate' belongs to lingen; choose another one."
    assert "settings" in by_name["mate", "lingen"]


def list_rows(what: str, site: Path) -> list[dict]:
    paths = [str(site), str(ROOT)]
    code = f"import sys; sys.path[:0] = {paths}; from lingen.cli import main; main(sys.argv[1:])"
    return json.loads(run_python("-c", code, "list", what, "--json"))


def test_an_installed_package_brings_a_mixer_and_a_scan(site):
    points = {"lingen.mixers": {"gain": "other_part:Gain"}, "lingen.scans": {"backwards": "other_part:backwards"}}
    check_plugin(package(site, "other-part", points))


@pytest.mark.slow
def test_a_package_installed_by_pip_brings_a_mixer_and_a_scan(site, tmp_path_factory, tiny_recipe):
    source = tmp_path_factory.mktemp("source")
    (source / "other_part.py").write_text(PLUGIN)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "other-part"\nversion = "1.0"\n'
        '[project.entry-points."lingen.mixers"]\ngain = "other_part:Gain"\n'
        '[project.entry-points."lingen.scans"]\nbackwards = "other_part:backwards"\n'
        '[tool.hatch.build.targets.wheel]\ninclude = ["other_part.py"]\n'
    )
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run_python(*pip, "--target", str(site), str(source))
    importlib.invalidate_caches()
    check_plugin(site)
    mixers = "model.mixer=[{name: gain, gain: 0.5}, {name: mamba2, scan: backwards, state_dim: 4, head_dim: 8}]"
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = ["fit", "--recipe", str(tiny_recipe), "--run", "run", mixers]
    done = run_command(*command, cwd=site, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert (site / "run" / "stages" / "clips" / "weights.safetensors").is_file()


def check_plugin(site: Path) -> None:
    """A recipe names the plugin's mixer, and lingen's own mixer scans in the plugin's order; both learn."""
    from lingen.model import LinGen

    (site / "r.yaml").write_text(RECIPE)
    for overrides in ([], ["model.mixer=mamba2", "model.mixer.head_dim=16", "model.mixer.scan=backwards"]):
        recipe = load_recipe(site / "r.yaml", [*overrides, "model.gate_init=1"])
        model = LinGen(recipe.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        latents, text = torch.randn(1, 3, 2, 8, 8), ((torch.randn(1, 3, 96), torch.ones(1, 3, dtype=torch.bool)),)
        losses = []
        for _ in range(3):
            loss = (model(latents, torch.full((1,), 0.5), text) - latents).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[2] < losses[0]
    assert SCANS["backwards"](1, 2, 2).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("registry", [MIXERS, SCANS, AUTOENCODERS, TEXT_ENCODERS], ids=lambda registry: registry.group)
def test_every_part_is_documented_and_takes_no_open_settings(registry):
    import inspect

    for name in registry.names():
        part = registry[name]
        if registry is SCANS:
            assert isinstance(part, (str, tuple)) or inspect.getdoc(part)
            continue
        assert inspect.getdoc(part), name
        kinds = {parameter.kind for parameter in inspect.signature(part).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, name
        assert all(setting.default is not inspect.Parameter.empty for setting in settings_of(part).values()), name


BOUNDED = [
    (registry, name, setting)
    for registry in COMPONENTS.values()
    for name in registry.names()
    for setting, declared in settings_of(registry[name]).items()
    if bounds_of(declared.hint)
]


@pytest.mark.parametrize(("registry", "name", "setting"), BOUNDED, ids=lambda one: getattr(one, "kind", one))
def test_numbers_out_of_bounds_are_refused_through_every_door(registry, name, setting):
    part, hint = registry[name], settings_of(registry[name])[setting].hint
    (bound,) = bounds_of(hint)
    low = bound.schema["minimum"] - 1 if "minimum" in bound.schema else bound.schema["exclusiveMinimum"]
    number = type(low)(low) if "float" not in str(hint) else float(low)
    value = (number,) * 3 if "tuple" in str(hint) else number
    positional = (16, 0) if registry is MIXERS else ()
    for build in (
        lambda: part(*positional, **{setting: value}),
        lambda: registry.build({"name": name, setting: value}),
    ):
        with pytest.raises(SettingError, match=f"^Expected {bound.text}.* got {number:g}") as error:
            build()
        assert error.value.setting == setting


def test_a_plugins_bounds_are_read_wherever_they_stand(registry):
    class Bounded:
        def __init__(
            self, dim, layer, *, size: Annotated[int, AtLeast(1)] | None = None,
            sides: tuple[Annotated[int, AtLeast(2)], ...] = (2,), rate: Annotated[float, Above(0), Finite()] = 1.0,
        ):  # fmt: skip
            pass

    registry.register("bounded")(Bounded)
    registry.build({"name": "bounded", "size": 1, "sides": [2, 3], "rate": 0.5}, 8, 0)
    with pytest.raises(SettingError) as error:
        registry.build({"name": "bounded", "size": 0, "sides": [2, 1], "rate": float("inf")}, 8, 0)
    assert error.value.problems == (
        "Expected at least 1, got 0. (at size of mixer 'bounded')",
        "Expected at least 2, got 1. (at sides.1 of mixer 'bounded')",
        "Expected a finite number, got inf. (at rate of mixer 'bounded')",
    )


def test_public_names():
    import lingen

    for name in lingen.__all__:
        assert getattr(lingen, name) is not None, name
    assert set(lingen.__all__) < set(dir(lingen))
    with pytest.raises(AttributeError, match="no attribute 'Lingen'"):
        getattr(lingen, "Lingen")  # noqa: B009
