"""Recipes: what is merged over what, every mistake's exact words, filled recipes that load again, shipped recipes."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lingen.plan.forecast import plan
from lingen.recipe import load_recipe, load_stages, stages_of, to_yaml
from lingen.recipe.errors import RecipeError, SettingError
from lingen.recipe.json_schema import json_schema
from lingen.recipe.reading import shipped_recipes
from lingen.recipe.registry import AUTOENCODERS, MIXERS, TEXT_ENCODERS
from lingen.recipe.signature import check_value, settings_of
from lingen.recipe.sizes import check_frames
from tests.helpers.commands import run_python

pytestmark = pytest.mark.usefixtures("here")

TINY = """\
model:
  dim: 32
  depth: 2
  mixer: {name: attention, num_heads: 2}
  patch: [1, 4, 4]
data: {synthetic: shapes, frames: 4, size: [16, 16], fps: 8}
"""
STAGED = (
    TINY
    + """\
stages:
  images: {data: {mix: {image: 1, video: 0}}, train: {steps: 3}}
  videos: {data: {frames: 8}, train: {steps: 5, lr: 1e-3}}
"""
)


def write(text: str, name: str = "r.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def parsed(text: str) -> object:
    """YAML as editors read it: 1e-3 is a number."""
    return OmegaConf.to_container(OmegaConf.create(text))


def problems(text: str, *overrides: str, stage: str | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), overrides, stage)
    return list(caught.value.problems)


def test_defaults_are_filled_and_lists_are_tuples():
    recipe = load_recipe(write(TINY))
    assert recipe.name == "r" and recipe.stage is None and recipe.stages == {}
    assert recipe.model.patch == (1, 4, 4) and recipe.data.size == (16, 16)
    assert recipe.model.mixer == {"name": "attention", "num_heads": 2, "kernel": "auto"}
    assert recipe.train.lr == 1e-4 and recipe.data.fps == 8.0 and isinstance(recipe.data.fps, float)
    assert recipe.model.channels == 3 and recipe.model.text_dims == (96,) and recipe.model.max_grid == (4, 4, 4)


def test_strength():
    Path("sub").mkdir()
    write("train: {lr: 2, steps: 2, warmup: 2, accumulate: 2}\n" + STAGED, "base.yaml")
    write(
        "extends: ../base\ntrain: {steps: 3, warmup: 3, accumulate: 3}\nstages: {videos: {train: {warmup: 4}}}".replace(
            "../base", "../base.yaml"
        ),
        "sub/r.yaml",
    )
    stage = load_recipe("sub/r.yaml", ["train.accumulate=5", "stages.videos.data.fps=4"], "videos")
    assert stage.data.workers == 2  # default
    assert stage.train.lr == 1e-3  # the parent's stage beats the parent
    assert stage.train.steps == 5  # ... and the child's sections
    assert stage.train.warmup == 4  # the child's stage
    assert stage.train.accumulate == 5 and stage.data.fps == 4.0
    assert load_recipe("sub/r.yaml", ["train.steps=7"], "videos").train.steps == 7  # an override beats every stage
    assert load_recipe("sub/r.yaml", ["train.steps=7", "stages.videos.train.steps=8"], "videos").train.steps == 8
    assert load_recipe("sub/r.yaml", ["stages.videos.train.steps=8", "train.steps=7"], "images").train.steps == 7
    assert stage.name == "r"


def test_stages():
    path = write(STAGED)
    assert stages_of(path) == ["images", "videos"]
    base = load_recipe(path)
    assert base.train.steps == 1000 and list(base.stages) == ["images", "videos"]
    images, videos = load_stages(path)
    assert (images.stage, videos.stage) == ("images", "videos") and images == load_recipe(path, stage="images")
    assert videos.train.steps == 5 and videos.data.frames == 8 and videos.stages == {}
    assert images.model.max_grid == videos.model.max_grid == base.model.max_grid == (8, 4, 4)
    assert stages_of(write(TINY)) == ["main"] and load_recipe("r.yaml", stage="main").stage == "main"


def test_a_changed_name_drops_the_old_settings():
    path = write(TINY)
    assert load_recipe(path, ["model.mixer=temporal_swin"]).model.mixer["window"] == (8, 4, 4)
    assert load_recipe(path, ["model.mixer=attention"]).model.mixer["num_heads"] == 2
    both = load_recipe(path, ["model.mixer=temporal_swin", "model.mixer.window=[4,4,4]"])
    assert both.model.mixer == {"name": "temporal_swin", "window": (4, 4, 4), "num_heads": None, "kernel": "auto"}


def test_lists_of_components():
    path = write(TINY + "text: [words, {name: bytes, dim: 32}]\n")
    assert load_recipe(path).model.text_dims == (96, 32)
    assert load_recipe(path, ["text.0.dim=64"]).model.text_dims == (64, 32)
    assert load_recipe(path, ["text=bytes"]).model.text_dims == (32,)  # the settings of the one that had the name
    assert load_recipe(path, ["text={name: bytes, dim: 16}"]).model.text_dims == (16,)
    assert load_recipe(path, ["text=[]"]).model.text_dims == ()
    hybrid = load_recipe(path, ["model.mixer=[temporal_swin, attention]", "model.mixer.1.num_heads=4"]).model.mixer
    assert [one["name"] for one in hybrid] == ["temporal_swin", "attention"] and hybrid[1]["num_heads"] == 4


MATE = "{name: mate, head_dim: 16, window: [2, 2, 2], ma: {name: mamba2, state_dim: 8, head_dim: 8}}"


def test_a_list_of_mixers_keeps_the_settings_of_the_same_name():
    path = write(TINY.replace("{name: attention, num_heads: 2}", MATE))
    alone = load_recipe(path).model.mixer
    assert load_recipe(path, ["model.mixer=[mate, attention]"]).model.mixer[0] == alone
    two = load_recipe(path, ["model.mixer=[attention, mate, {name: mate, window: [1, 2, 2]}]"]).model.mixer
    assert two[0]["num_heads"] is None and two[1] == alone and two[2] == {**alone, "window": (1, 2, 2)}
    back = load_recipe(path, ["model.mixer=[attention, mate]", "model.mixer=mate"]).model.mixer
    assert back == alone
    staged = write(TINY.replace("{name: attention, num_heads: 2}", MATE) + "stages: {a: {model: {mixer: [mate]}}}\n")
    assert load_recipe(staged, stage="a").model.mixer == [alone]


def test_lists_in_which_a_name_has_several_settings_are_laid_over_one_another_in_order():
    several = "[{name: attention, num_heads: 2}, {name: attention, num_heads: 4}, linear_attention]"
    path = write(TINY.replace("{name: attention, num_heads: 2}", several))

    def heads(override: str) -> list[int | None]:
        return [one["num_heads"] for one in load_recipe(path, [override]).model.mixer]

    assert heads("model.mixer=[attention, {name: attention, kernel: sdpa}]") == [2, 4]
    assert heads("model.mixer=[linear_attention]") == [None] and heads("model.mixer.0.num_heads=1")[:2] == [1, 4]
    # A filled recipe gives its lists whole.
    filled = load_recipe(path)
    assert load_recipe(write(to_yaml(filled), "filled.yaml")).model.mixer == filled.model.mixer
    for override in ("model.mixer=attention", "model.mixer=[attention, linear_attention]"):
        with pytest.raises(RecipeError, match="has 2 'attention' with different settings, and which stay is not said"):
            load_recipe(path, [override])


def test_interpolation_follows_the_stage():
    path = write(STAGED + "train: {warmup: '${train.steps}'}\nsample: {steps: '${data.frames}'}\n")
    assert load_recipe(path, stage="videos").train.warmup == 5
    assert load_recipe(path).sample.steps == 4 and load_recipe(path, stage="videos").sample.steps == 8


@pytest.mark.parametrize("overrides", [(), ("train.steps=9", "stages.images.model.checkpointing=true", "text=bytes")])
def test_a_filled_recipe_loads_again(overrides):
    path = write(
        STAGED + "init: 1e-4\nsample: {prompts: ['${a}', 'null', '3', 'ends: here']}\n".replace("${a}", r"\${a}")
    )
    base = load_recipe(path, [*overrides, "init='1e-4'"])
    assert base.init == "1e-4" and base.sample.prompts == ["${a}", "null", "3", "ends: here"]
    filled = write(to_yaml(base), "filled.yaml")
    assert load_recipe(filled) == base
    stages = load_stages(path, [*overrides, "init='1e-4'"])
    assert load_stages(filled) == stages
    for stage in stages:
        one = write(to_yaml(stage), "one.yaml")
        assert load_recipe(one) == load_recipe(one, stage=stage.stage) == stage and stages_of(one) == [stage.stage]


def test_a_filled_stage_keeps_the_tables_of_all_stages():
    images = load_recipe(write(STAGED), stage="images")
    assert load_recipe(write(to_yaml(images), "one.yaml")).model.max_grid == (8, 4, 4)
    assert load_recipe("one.yaml", ["data.size=[32,32]"]).model.max_grid == (8, 8, 8)


MISTAKES = {
    "unknown key": (
        "model:\n  detph: 3\n" + "data: {synthetic: shapes}",
        "r.yaml:2: Key 'detph' not in 'LinGenConfig'. Did you mean 'depth'? (at model.detph)",
    ),
    "unknown section": (
        TINY + "modle: {}\n",
        "r.yaml:7: Key 'modle' not in 'Recipe'. Did you mean 'model'? (at modle)",
    ),
    "unknown key in a stage": (
        STAGED + "  third: {train: {stps: 3}}\n",
        "r.yaml:10: Key 'stps' not in 'TrainConfig'. Did you mean 'steps'? (at stages.third.train.stps)",
    ),
    "unknown setting": (
        TINY.replace("num_heads", "num_head"),
        "r.yaml:4: Key 'num_head' not in 'Attention'. Did you mean 'num_heads'? (at model.mixer.num_head)",
    ),
    "derived key": (
        TINY.replace("depth: 2", "channels: 4"),
        "r.yaml:3: Key 'channels' of 'LinGenConfig' is worked out from the rest of the recipe; take it out. "
        "(at model.channels)",
    ),
    "a float for an int": (
        TINY.replace("depth: 2", "depth: 2.0"),
        "r.yaml:3: Expected a whole number, got 2.0. (at model.depth)",
    ),
    "true for an int": (
        TINY.replace("depth: 2", "depth: true"),
        "r.yaml:3: Expected a whole number, got true. (at model.depth)",
    ),
    "a number for text": (TINY + "init: 3\n", "r.yaml:7: Expected text or null, got 3. (at init)"),
    "a wrong choice": (
        TINY + "sample: {solver: eular}\n",
        "r.yaml:7: Expected 'euler' or 'heun' or 'ab2', got 'eular'. Did you mean 'euler'? (at sample.solver)",
    ),
    "a wrong type in a part": (
        TINY.replace("num_heads: 2", "num_heads: two"),
        "r.yaml:4: Expected a whole number or null, got 'two'. (at model.mixer.num_heads)",
    ),
    "tuple length": (
        TINY.replace("[1, 4, 4]", "[4, 4]"),
        "r.yaml:5: Expected 3 whole numbers, got 2. (at model.patch)",
    ),
    "tuple entry": (
        TINY.replace("[1, 4, 4]", "[1, 4, x]"),
        "r.yaml:5: Expected a whole number, got 'x'. (at model.patch.2)",
    ),
    "a list for a mapping": (
        TINY + "train: [1, 2]\n",
        "r.yaml:7: Expected a mapping with the settings of 'TrainConfig', got [1, 2]. (at train)",
    ),
    "unknown mixer": (
        TINY.replace("attention", "atention").replace(", num_heads: 2", ""),
        "r.yaml:4: There is no mixer called 'atention'. Did you mean 'attention'? Known: attention, "
        "linear_attention, mamba2, mate, "
        "temporal_swin. To use your own, write 'module:Class'. (at model.mixer.name)",
    ),
    "unknown autoencoder": (
        TINY + "autoencoder: taf\n",
        "r.yaml:7: There is no autoencoder called 'taf'. Did you mean 'tae'? Known: "
        f"{', '.join(AUTOENCODERS.names())}. To use your own, write 'module:Class'. (at autoencoder)",
    ),
    "a part without a name": (
        TINY + "text: [{dim: 3}]\n",
        f"r.yaml:7: This text encoder has no name. Known: {', '.join(TEXT_ENCODERS.names())}. (at text.0.name)",
    ),
    "no autoencoder": (
        TINY + "autoencoder: null\n",
        f"r.yaml:7: There is no autoencoder named here. Known: {', '.join(AUTOENCODERS.names())}. (at autoencoder)",
    ),
    "a name that is no word": (
        TINY + "autoencoder: {name: 3}\n",
        f"r.yaml:7: This autoencoder has no name. Known: {', '.join(AUTOENCODERS.names())}. (at autoencoder.name)",
    ),
    "unknown perceptual distance": (
        TINY + "reconstruction:\n  features: vgg\n",
        "r.yaml:8: There is no perceptual distance called 'vgg'. Did you mean 'vgg16'? Known: lpips, none, vgg16. To "
        "use your own, write 'module:Class'. (at reconstruction.features)",
    ),
    "a setting of the perceptual distance": (
        TINY + "reconstruction:\n  features:\n    name: vgg16\n    paht: here\n",
        "r.yaml:10: Key 'paht' not in 'VGG16Distance'. Did you mean 'path'? (at reconstruction.features.paht)",
    ),
    "nothing to compare with": (
        TINY + "reconstruction: {features: none, l1: 0}\n",
        "r.yaml:7: l1=0 and no perceptual distance leave nothing that compares a clip with its reconstruction. (at "
        "reconstruction.l1)",
    ),
    "a branch that does not exist": (
        TINY.replace("attention, num_heads: 2", "mate, ma: mamba3, head_dim: 16"),
        "r.yaml:4: There is no mixer called 'mamba3'. Did you mean 'mamba2'? Known: attention, "
        "linear_attention, mamba2, mate, "
        "temporal_swin. To use your own, write 'module:Class'. (at model.mixer)",
    ),
    "a part that cannot be imported": (
        TINY + "autoencoder: nowhere:Nothing\n",
        "r.yaml:7: Cannot load 'nowhere:Nothing': ModuleNotFoundError: No module named 'nowhere'. It is looked for in "
        "the current folder, on PYTHONPATH and among what is installed. (at autoencoder)",
    ),
    "heads": (
        TINY.replace("num_heads: 2", "num_heads: 5"),
        "r.yaml:4: num_heads=5 does not divide the width 32; choose one of 1, 2, 4, 8, 16, 32. (at "
        "model.mixer.num_heads)",
    ),
    "heads of the cross-attention": (
        TINY.replace("depth: 2", "num_heads: 5"),
        "r.yaml:3: num_heads=5 does not divide the width 32; choose one of 1, 2, 4, 8, 16, 32. (at model.num_heads)",
    ),
    "patch and size": (
        TINY.replace("[16, 16]", "[16, 18]"),
        "r.yaml:6: The width of 18 pixels is no multiple of 4, the autoencoder's stride 1 times the patch 4; "
        "take 16 or 20. "
        "(at data.size)",
    ),
    "patch and frames": (
        TINY.replace("[1, 4, 4]", "[3, 4, 4]"),
        "r.yaml:6: A clip of 4 frames is 4 latent frames (stride 1), which patches of 3 do not fill; take 3 or 6 "
        "frames. "
        "(at data.frames)",
    ),
    "mix without shards": (
        TINY.replace("synthetic: shapes", "shards: {video: v.tar}"),
        "r.yaml:6: The mix asks for image batches, and there are no image shards; set data.shards.image, or "
        "data.mix.image=0. (at data.mix.image)",
    ),
    "neither shards nor synthetic clips": (
        TINY.replace("synthetic: shapes", "mix: {image: 0}"),
        "r.yaml:6: The mix asks for video batches, and there are no video shards; set data.shards.video, or "
        "data.mix.video=0, or data.synthetic=shapes (as `extends: quickstart_cpu` has it). (at data.mix.video)",
    ),
    "empty mix": (
        TINY + "stages: {one: {data: {mix: {image: 0, video: 0}}}}\n",
        "r.yaml:7: This mix is empty; image or video must be above 0. (at stages.one.data.mix)",
    ),
    "parts behind a frame rate": (
        TINY + "text: {name: words, parts: true}\n",
        "r.yaml:7: The text encoder 'words': frames of later parts would not see the frame rate: set "
        "data.fps_prefix=false (at text.name)",
    ),
    "score without synthetic clips": (
        TINY.replace("synthetic: shapes", "shards: {video: v.tar, image: i.tar}") + "score: {clips: 3}\n",
        "r.yaml:7: Only clips of data.synthetic=shapes can be scored; set it, or score.clips=0. (at score.clips)",
    ),
    "interpolation loop": (
        TINY + "train: {steps: '${sample.steps}'}\nsample: {steps: '${train.steps}'}\n",
        "r.yaml:7: Interpolation ${sample.steps} leads back to itself. (at train.steps)",
    ),
    "interpolation of nothing": (
        TINY + "train: {steps: '${sample.stepz}'}\n",
        "r.yaml:7: Interpolation ${sample.stepz} names a key that the recipe does not have. (at train.steps)",
    ),
    "interpolation cut short": (
        TINY + "init: '${sample.steps'\n",
        "r.yaml:7: This value cannot be read: no viable alternative at input '${sample.steps'. (at init)",
    ),
    "invalid YAML": (
        "model: {dim: 3\ndata: {}\n",
        "r.yaml:2: This is not valid YAML: expected ',' or '}', but got ':'.",
    ),
    "a tab": (
        "model:\n\tdim: 3\n",
        "r.yaml:2: This is not valid YAML: found character '\\t' that cannot start any token.",
    ),
    "empty file": ("# nothing\n", "r.yaml: The file is empty; a recipe has sections such as model and data."),
    "no mapping": ("- a\n- b\n", "r.yaml:1: A recipe is a mapping of sections."),
    "a key twice": (TINY + "model: {}\n", "r.yaml:7: Key 'model' is written twice, first at r.yaml:1. (at model)"),
    "a key that is no text": (TINY + "3: {}\n", "r.yaml:7: Key 3 is not text; put it in quotes."),
    "stages as a list": (
        TINY + "stages: [a]\n",
        "r.yaml:7: Stages are a mapping: a name and an overlay for each. (at stages)",
    ),
    "a stage as a list": (TINY + "stages: {a: [b]}\n", "r.yaml:7: A stage is a mapping of sections. (at stages.a)"),
    "a stage outside of the run folder": (
        TINY + "stages: {../../a: {}}\n",
        "r.yaml:7: A stage's name, as '../../a', names a folder: take letters and digits, and not 'score', which is "
        "where judged clips lie. (at stages.../../a)",
    ),
    "a stage where judged clips lie": (
        TINY + "stages: {score: {}}\n",
        "r.yaml:7: A stage's name, as 'score', names a folder: take letters and digits, and not 'score', which is "
        "where judged clips lie. (at stages.score)",
    ),
    "a stage in a stage": (
        TINY + "stages: {a: {stages: {}}}\n",
        "r.yaml:7: A stage cannot set 'stages'. (at stages.a.stages)",
    ),
    "weights that do not carry over": (
        STAGED + "  third: {model: {dim: 64}}\n",
        "r.yaml:10: The weights of stage 'third' have other shapes than those of stage 'images'. (at "
        "stages.third.model.dim)",
    ),
    "trainer": (
        TINY + "trainer:\n  acelerator: cpu\n",
        "r.yaml:8: Key 'acelerator' not in 'Trainer'. Did you mean 'accelerator'? (at trainer.acelerator)",
    ),
    "trainer's type": (
        TINY + "trainer: {max_time: 3}\n",
        "r.yaml:7: Expected text or timedelta or a mapping or null, got 3. (at trainer.max_time)",
    ),
    "trainer's steps": (
        TINY + "trainer: {max_steps: 3}\n",
        "r.yaml:7: 'max_steps' is not set here but by train.steps. (at trainer.max_steps)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    text, expected = MISTAKES[name]
    assert expected in problems(text)


@pytest.mark.parametrize(
    ("setting", "text"),
    {
        "model.depth=0": "Expected at least 1, got 0. (at model.depth)",
        "train.steps=0": "Expected at least 1, got 0. (at train.steps)",
        "data.size=[0,16]": "Expected at least 1, got 0. (at data.size.0)",
        "data.fps=0": "Expected a number above 0, got 0. (at data.fps)",
        "data.batch.video=-1": "Expected at least 1, got -1. (at data.batch.video)",
        "train.text_drop=2": "Expected a number from 0 to 1, got 2. (at train.text_drop)",
        "seed=4294967296": "Expected a number from 0 to 4,294,967,295, got ",
        "train.lr=-1": "Expected at least 0, got -1. (at train.lr)",
        "train.lr=fast": "Expected a number, got 'fast'. (at train.lr)",
        "score.clips=301": "Expected a number from 0 to 300, got 301. (at score.clips)",
        "sample.guidance_interval=[.5,.2]": "The interval ends at 0.2, before it begins at 0.5. (at "
        "sample.guidance_interval)",
        "model.depth": "'model.depth' is no override; say key=value, e.g. model.depth=4.",
        "=4": "'=4' is no override; say key=value, e.g. model.depth=4.",
        "model.detph=4": "Key 'detph' not in 'LinGenConfig'. Did you mean 'depth'? (at model.detph)",
        "model.patch=[1,2": "This is not valid YAML: did not find expected ',' or ']'. (at model.patch)",
        "model.zzz=4": "Key 'zzz' not in 'LinGenConfig'. Known: dim, depth, mixer, num_heads, ffn_dim, patch, predict, "
        "gate_init, position_std, pool_text, checkpointing, max_grid. (at model.zzz)",
        "model.mixer.zzz=4": "Key 'zzz' not in 'Attention'. Known: num_heads, kernel. (at model.mixer.zzz)",
        "model.checkpointing=0": "Expected a number above 0 or true or false, got 0. (at model.checkpointing)",
        "time.shift=0": "Expected a number above 0 or 'auto', got 0. (at time.shift)",
        "data.lengths=[4, 0]": "Expected at least 1, got 0. (at data.lengths.1)",
        "rewrite.temperature=.inf": "Expected a finite number, got inf. (at rewrite.temperature)",
        "model=4": "Expected a mapping with the settings of 'LinGenConfig', got 4. (at model)",
        "text.1.dim=3": "text is a list of 1; say text.0 for its first entry. (at text.1)",
        "text.dim=3": "text is a list of 1; say text.0 for its first entry. (at text.dim)",
        "stages.audio.train.steps=3": "There is no stage called 'audio'. Known: images, videos. (at stages.audio)",
        "stages.video.train.steps=3": "There is no stage called 'video'. Did you mean 'videos'? Known: images, videos. "
        "(at stages.video)",
        "stages.videos=3": "Say stages.NAME.key=value. (at stages.videos)",
        "model.mixer={name: temporal_swin, window: [0,4,4]}": ("Expected at least 1, got 0. (at model.mixer.window.0)"),
        "model.mixer={name: mamba2, head_dim: 16, review: [2,0,2]}": (
            "Expected at least 1, got 0. (at model.mixer.review.1)"
        ),
    }.items(),
)
def test_mistakes_on_the_command_line(setting, text):
    found = problems(STAGED, setting)
    assert any(line.startswith(f"command line: {text}") for line in found), found


def test_sizes_below_one_are_said_at_their_own_line():
    text = TINY.replace(
        "mixer: {name: attention, num_heads: 2}", "mixer:\n    name: mamba2\n    head_dim: 16\n    review: [2, 0, 2]"
    )
    (found,) = problems(text)
    assert found.startswith("r.yaml:7: ") and found.endswith("(at model.mixer.review.1)")


def test_unknown_stage_and_recipe():
    assert problems(STAGED, stage="image") == [
        "There is no stage called 'image'. Did you mean 'images'? Known: images, videos."
    ]
    known = "Known: " + ", ".join(shipped_recipes())
    with pytest.raises(RecipeError, match=f"no recipe called 'quikstart_cpu'. Did you mean 'quickstart_cpu'. {known}"):
        load_recipe("quikstart_cpu")
    with pytest.raises(RecipeError, match="There is no recipe file 'no/such.yaml'."):
        load_recipe("no/such.yaml")
    with pytest.raises(RecipeError, match="^There is no recipe file 'nofile.yaml'.$"):
        load_recipe("nofile.yaml")
    with pytest.raises(RecipeError, match="recipe file 'quikstart_cpu.yaml'. Did you mean 'quickstart_cpu'.$"):
        load_recipe("quikstart_cpu.yaml")


def test_extends_may_be_no_path_at_all(here: Path):
    write("extends: " + "x" * 5000, "long.yaml")
    with pytest.raises(RecipeError, match="^long.yaml:1: There is no recipe called 'xxx"):
        load_recipe("long.yaml")


def test_extends_takes_one_level():
    write(TINY, "a.yaml")
    write("extends: a\n".replace("a\n", "a.yaml\n"), "b.yaml")
    assert load_recipe("b.yaml").model.dim == 32 and load_recipe("b.yaml").name == "b"
    write("\nextends: b.yaml\n", "c.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe("c.yaml")
    assert (
        str(caught.value) == "c.yaml:2: 'b.yaml' extends another recipe itself; only one level is allowed. (at extends)"
    )
    write("extends: t2v_67s\n", "d.yaml")
    with pytest.raises(
        RecipeError, match="^d.yaml:1: There is no recipe called 't2v_67s'. Did you mean 't2v_68s'.* \\(at extends\\)$"
    ):
        load_recipe("d.yaml")
    assert load_recipe(write("extends: quickstart_cpu\nmodel: {depth: 1}\n")).model.dim == 96


def test_all_mistakes_at_once():
    text = TINY.replace("depth", "detph") + "train: {lr: fast, betas: [1]}\nstages: {a: {text: [wrods]}}\n"
    places = [line.partition(": ")[0] for line in problems(text, "seed=x")]
    assert places == ["command line", "r.yaml:3", "r.yaml:7", "r.yaml:7", "r.yaml:8"]


def test_numbers_out_of_bounds_hide_no_other_mistake():
    text = TINY + "sample:\n  steps: 0\n  tile: [8, 8]\n  decode: whole\n"
    setting = "data={fps: 0, batch: {image: 0}, mix: {image: 0, video: 0}}"
    assert {line.partition(" (at ")[2].rstrip(")"): line.partition(": ")[0] for line in problems(text, setting)} == {
        "data.batch.image": "command line", "data.fps": "command line", "sample.steps": "r.yaml:8",
        "sample.tile": "r.yaml:9",
    }  # fmt: skip
    sample = "sample.guidance_interval=[.5,.2]"
    places = [line.partition(" (at ")[2] for line in problems(TINY, setting, "data.batch.vdeo=3", sample)]
    assert places == ["data.batch.vdeo)", "data.batch.image)", "data.fps)"]
    places = [line.partition(" (at ")[2] for line in problems(TINY, setting, "sample.steps=0", sample)]
    assert places == ["data.batch.image)", "data.fps)", "sample.steps)", "data.mix)", "sample.guidance_interval)"]


def test_what_needs_no_torch_is_said_without_torch():
    write(STAGED)
    code = (
        "import sys; from lingen.recipe import load_recipe, stages_of; from lingen.recipe.errors import RecipeError\n"
        "assert stages_of('r.yaml') == ['images', 'videos']\n"
        "try: load_recipe('r.yaml', ['model.detph=3', 'model.mixer=mamba'])\n"
        "except RecipeError as error: assert len(error.problems) == 2, error\n"
        "else: raise AssertionError\n"
        "assert not {'torch', 'lightning', 'av', 'webdataset'} & set(sys.modules)"
    )
    run_python("-c", code)


def test_importing_lingen_needs_no_decoders():
    code = (
        "import sys; import lingen, lingen.model, lingen.kernels, lingen.recipe\n"
        "assert not {'av', 'webdataset', 'omegaconf'} & set(sys.modules), 'too much is imported'"
    )
    run_python("-c", code)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_build_on_meta_and_load_again(name):
    base, stages = load_recipe(name), load_stages(name)
    assert load_recipe(write(to_yaml(base))) == base and load_stages("r.yaml") == stages
    assert [stage.stage for stage in stages] == stages_of(name)
    for stage in stages:
        assert all(count > 0 for count in plan(stage).tokens.values())
    file = shipped_recipes()[name]
    jsonschema.validate(parsed(file.read_text(encoding="utf-8")), json_schema())
    assert re.match(r"# yaml-language-server: \$schema=(\./)?recipe\.schema\.json\n", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("overrides", [(), ("model.mixer=attention", "model.depth=38")])
def test_lingen_and_its_dit_twin_have_four_billion_parameters(overrides):
    forecast = plan(load_recipe("t2v_68s", overrides, stage="t2v_512_68s"))
    assert forecast.trained == pytest.approx(4.0e9, rel=0.05)
    assert forecast.tokens == {"image": 1024, "video": 139_264} and forecast.grids["video"] == (136, 32, 32)


def test_the_six_stages_are_the_papers():
    stages = load_stages("t2v_68s")
    assert [stage.data.frames for stage in stages] == [1, 272, 272, 544, 1088, 1088]
    assert [stage.data.size[0] for stage in stages] == [256, 256, 512, 512, 512, 512]
    assert {stage.model.max_grid for stage in stages} == {(136, 32, 32)}
    assert (stages[1].data.mix.image, stages[1].data.mix.video) == (1, 100)


def test_lingens_flops_grow_linearly_and_attentions_do_not():
    def ratio(*overrides: str) -> float:
        short, long = (
            plan(load_recipe("t2v_68s", overrides, stage=s)).flops["video"] for s in ("t2v_512_17s", "t2v_512_68s")
        )
        return long / short

    assert ratio() == pytest.approx(4, rel=0.01)  # the text takes the same for either
    assert ratio("model.mixer=attention") > 10


def test_the_schema_file_is_that_of_the_code():
    """After a change: lingen show --schema > recipes/recipe.schema.json"""
    shipped = next(iter(shipped_recipes().values())).parent / "recipe.schema.json"
    assert json.loads(shipped.read_text(encoding="utf-8")) == json.loads(json.dumps(json_schema()))


def test_the_schema_finds_what_the_loader_finds():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(parsed(STAGED)) and validator.is_valid(parsed(to_yaml(load_recipe(write(STAGED)))))
    for text in (
        "model: {detph: 3}",
        "model: {patch: [1, 2]}",
        "stages: {a: {train: {stps: 3}}}",
        "model: {mixer: mamba}",
    ):
        assert not validator.is_valid(parsed(text)), text
    assert not validator.is_valid(parsed("model: {mixer: {name: mate, windw: [1, 2, 3]}}"))
    for text, valid in {
        "model: {depth: 0}": False,
        "data: {batch: {video: 0}}": False,
        "data: {mix: {video: 0}}": True,
        "data: {fps: 0}": False,
        "score: {clips: 301}": False,
        "model: {checkpointing: 0}": False,
        "model: {checkpointing: false, num_heads: null}": True,
        "model: {mixer: {name: mamba2, review: [2, 0, 2]}}": False,
        "stages: {a: {train: {betas: [0.9, 1.1]}}}": False,
    }.items():
        assert validator.is_valid(parsed(text)) == valid, text


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3))


@given(SCALARS, st.sampled_from([bool, int, float, str, int | None, float | str, tuple[int, int], tuple[float, ...]]))
def test_check_value_returns_what_the_hint_says_or_a_sentence(value, hint):
    converted, problem = check_value([value, value], hint) if "tuple" in str(hint) else check_value(value, hint)
    if problem is None and hint in (bool, int, float, str):
        assert type(converted) is hint
    elif problem is None and "tuple" in str(hint):
        assert isinstance(converted, tuple) and {type(one) for one in converted} <= {
            int if hint == tuple[int, int] else float
        }
    elif problem is not None:
        assert problem.startswith("Expected ")


def test_documentation_of_settings_comes_from_the_signature():
    from lingen.recipe.sections import DataConfig

    assert settings_of(DataConfig)["size"].doc == "height and width in pixels"
    assert settings_of(MIXERS["mate"])["window"].default == (8, 4, 4)


def test_a_kernel_that_needs_cuda_is_refused_for_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = STAGED + "trainer: {accelerator: cpu}\n"
    for kernel, branch in (("triton", "kernel: triton"), ("flash", "te: {name: attention, kernel: flash}")):
        setting = f"model.mixer={{name: mate, state_dim: 4, head_dim: 8, {branch}}}"
        key = "te.kernel" if "te:" in branch else "kernel"
        text = f"kernel='{kernel}' runs on CUDA, but trainer.accelerator is cpu; take kernel='auto'."
        assert problems(cpu, setting) == [f"command line: {text} (at model.mixer.{key})"]
        load_recipe(write(STAGED), [setting])  # the machine that trains may have CUDA
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    load_recipe(write(cpu), ["model.mixer={name: mate, state_dim: 4, head_dim: 8, kernel: triton}"])


class FirstAlone:
    first_frame_alone = True

    def __init__(self, stride, unit):
        self.strides, self.frame_unit = (stride, 8, 8), unit


@pytest.mark.parametrize(
    ("autoencoder", "patch", "fitting", "frames", "told"),
    [
        (FirstAlone(4, 4), 1, (1, 5, 17), 19, "the others come by 4: 19 frames do not fit; take 17 or 21 frames"),
        (FirstAlone(4, 8), 1, (1, 9, 17), 5, "the others come by 8: 5 frames do not fit; take 1 or 9 frames"),
        (FirstAlone(4, 4), 2, (5, 13, 21), 17, "17 frames is 5 latent frames .*; take 13 or 21 frames"),
        (FirstAlone(4, 4), 2, (5, 13, 21), 14, "14 frames do not fit; take 13 or 21 frames"),
        (FirstAlone(4, 4), 2, (5,), 1, "1 frames is 1 latent frames .*; take 5 frames"),
        (FirstAlone(4, 8), 2, (), 17, "no length does; take patches of 1 along t"),
        (AUTOENCODERS.build("pixels"), 3, (3, 6), 4, "patches of 3 do not fill; take 3 or 6 frames"),
    ],
)  # fmt: skip
def test_lengths_that_an_autoencoder_and_patches_take(autoencoder, patch, fitting, frames, told):
    for length in fitting:
        check_frames(length, autoencoder, patch)
    with pytest.raises(SettingError, match=told):
        check_frames(frames, autoencoder, patch)


def test_wan_and_patches_along_time_say_which_clips_they_take():
    text = (
        "A clip of 17 frames is 5 latent frames (stride 4), which patches of 2 do not fill; take 13 or 21 frames. (at "
        "stages.videos.data.frames)"
    )
    wan = STAGED + "autoencoder: {name: diffusers, class_name: AutoencoderKLWan}\n"
    clips = ("data.size=[64,64]", "model.patch=[2,4,4]", "stages.videos.data.frames=17", "data.frames=13")
    assert problems(wan, *clips) == [f"command line: {text}"]
    load_recipe(write(wan), [*clips, "stages.videos.data.frames=21"])


def test_the_perceptual_distance_is_a_component_of_its_own():
    recipe = load_recipe(write(TINY), ["reconstruction.features.path=here.safetensors"])
    assert recipe.reconstruction.features == {"name": "vgg16", "path": "here.safetensors"}  # nothing is read
    assert load_recipe(write(TINY), ["reconstruction.features=lpips"]).reconstruction.features == {
        "name": "lpips", "path": None
    }  # fmt: skip
    assert load_recipe(write(to_yaml(recipe), "filled.yaml")).reconstruction == recipe.reconstruction


def test_forecast_of_an_autoencoders_training():
    short, detail = (plan(stage) for stage in load_stages("tae_8x8x8"))
    assert short.tokens == {"image": 16 * 16, "video": 2 * 16 * 16}
    assert detail.tokens == {"image": 32 * 32, "video": 2 * 32 * 32}
    assert short.parameters == detail.parameters and set(short.parameters) == {"encoder", "decoder"}
    assert short.frozen == 0 and short.checkpoint == 16 * short.trained
    for kind in ("image", "video"):  # four times the pixels
        assert detail.flops[kind] / short.flops[kind] == pytest.approx(4, rel=0.02)
        assert short.training_flops[kind] == 3 * short.flops[kind]
