"""The command line as a shell sees it: exit codes, what goes to stdout and what to stderr."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lingen.cli import COMMANDS, main
from lingen.recipe import load_recipe
from lingen.recipe.reading import shipped_recipes
from lingen.recipe.registry import MIXERS, SCANS, registries
from tests.helpers.commands import ROOT, lingen_command, run_command, run_python

pytestmark = pytest.mark.usefixtures("here")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from lingen.cli import main; assert main(['--help']) == 0\n"
        "heavy = {'torch', 'lightning', 'omegaconf', 'rich', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run_python("-c", code, cwd=ROOT)


def test_clips_are_made_without_a_trainer(here: Path):
    code = (
        "import sys; from lingen.cli import main\n"
        "assert main(['demo', 'a dog jumps', '--seconds', '0.1', '--steps', '1', '--out', 'x.webp']) == 0\n"
        "heavy = {'lightning', 'torchmetrics', 'torchvision', 'transformers', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run_python("-c", code, cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (here / "x.webp").is_file()


def test_weights_that_are_not_there_are_told_without_torch():
    code = (
        "import sys, pathlib, lingen.weights; from lingen.cli import main\n"
        "lingen.weights.BUILT_IN['theatre_128'] = pathlib.Path('nowhere')\n"
        "for line in sys.stdin: assert main(line.split()) == 2, line\n"
        "assert not {'torch', 'lightning', 'omegaconf'} & set(sys.modules)"
    )
    lines = {
        "demo a dog jumps": "theatre_128: this installation has no weights of it.",
        "demo a dog --checkpoint none": "none: there is no run folder or weights file.",
        "sample --run none --prompt x": "none: there is no run folder or weights file.",
        "export none --to diffusers new": "none: there is no run folder or weights file.",
        "export none --out x.txt": "none: there is no run folder or weights file.",
        "eval tae --run none": "none: there is no run folder or weights file.",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True, cwd=ROOT
    )
    told = done.stderr.splitlines()
    assert done.returncode == 0 and len(told) == len(lines), done.stderr
    for want, line in zip(lines.values(), told, strict=True):
        assert want in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("export x --to diffusers", "argument --to: expected 2 arguments. Write --to diffusers DIR."),
        ("export x --to diffuser d", "--to knows no 'diffuser'. Did you mean 'diffusers'? A folder: --to diffusers"),
        ("export x --to file y", "--to knows no 'file'. A folder: --to diffusers DIR; a file: --out F."),
        ("export x --to diffusers d --out f", "Say what to write: either --out F.safetensors, or --to diffusers DIR."),
        ("export x", "Say what to write: either --out F.safetensors, or --to diffusers DIR."),
        ("export --run x --out f", "unrecognized arguments: --run. Did you mean 'run'?"),
        ("export --out f", "lingen export: the following arguments are required: RUN."),
        ("sample --steps", "argument --steps: expected one argument. Write --steps=N. `lingen sample --help`"),
        ("data pack --videos --out x", "--videos: expected at least one argument. Write --videos DIR."),
        ("list nothing", "lingen list: argument what: invalid choice: 'nothing'"),
        ("list recipe", "'recipes'). Did you mean 'recipes'? `lingen list --help`"),
        ("train --recipe x", "no command called 'train'. Did you mean 'fit'?"),
        ("generate", "no command called 'generate'. Did you mean 'sample'?"),
        ("data", "arguments are required: {pack,caption,fetch,check,stats,index}."),
        ("eval", "arguments are required: {tae,clips,"),
        ("study", "arguments are required: {make,report}."),
        ("prompts", "arguments are required: {"),
        ("data check d --ranks -2", "argument --ranks: '-2' is no whole number above 0. Write --ranks N."),
        ("data index d --processes -1", "argument --processes: '-1' is no whole number from 0 on."),
        ("data check --recipe quickstart_cpu trainer.devices=two", "(as 0,1) or auto, got 'two'. (at trainer.devices)"),
        ("new mixer class", "A part has a name that is no word of Python's own, such as my_mixer; got 'class'."),
        ("data fech", "no command called 'data fech'. Did you mean 'data fetch'?"),
        (
            "fit --recipe quickstart_cpu --lr 1e-3",
            "--lr. Did you mean 'train.lr=1e-3'?",
        ),
        ("fit --learning-rate=2", "Did you mean 'train.lr=2'?"),
        ("fit --steps 4 seed=1", "Did you mean 'train.steps=4'?"),
        ("fit --depth", "Did you mean 'model.depth=...'?"),
        ("fit --rcipe x", "--rcipe. Did you mean '--recipe'?"),
        ("sample --run x --num-inference-steps 3", "Did you mean '--steps'?"),
        (
            "fit --recipe quickstart_cpu train.learning_rate=1",
            "'learning_rate' not in 'TrainConfig'. Did you mean 'lr'?",
        ),
    ],
)
def test_wrong_words_are_one_line_with_the_cure(words: str, told: str, capsys):
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_prompt_without_its_flag_is_told_with_it(capsys):
    assert main(["sample", "--run", "x", "a red circle"]) == 2
    assert "unrecognized arguments: a red circle. Write --prompt 'a red circle'." in capsys.readouterr().err


def test_a_crash_outside_of_python_tells_where_it_was(tmp_path: Path):
    (tmp_path / "crashes.py").write_text("import ctypes\nctypes.string_at(0)\n")
    done = run_command(
        "show",
        "--recipe",
        "quickstart_cpu",
        "--import",
        "crashes",
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr and "crashes.py" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    assert f"lingen {name}" in capsys.readouterr().out


def test_list_mixers(capsys):
    assert main(["list", "mixers", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(MIXERS.names())
    assert rows["mate"]["settings"]["window"] == [8, 4, 4] and rows["mate"]["origin"] == "lingen"
    assert main(["list", "mixers"]) == 0
    out = capsys.readouterr().out
    assert "window=[8, 4, 4]" in out and len(out.splitlines()) == 1 + len(rows)
    assert out.splitlines()[0].index("settings") < 160, "the longest column comes last, so that nothing is padded by it"


def test_list_scans_shows_how_far_neighbours_are(capsys):
    assert main(["list", "scans", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(SCANS.names())
    key = "steps between neighbours at (8, 16, 16)"
    assert rows["thw"][key] == {"t": 256.0, "h": 16.0, "w": 1.0}
    assert rows["rotary_major"][key]["t"] < 256 and rows["hilbert"][key]["t"] < 256


@pytest.mark.parametrize("what", ["autoencoders", "text", "synthetic", "recipes"])
def test_list(what, capsys):
    assert main(["list", what]) == 0
    one = {"autoencoders": "pixels", "text": "words", "synthetic": "shapes", "recipes": "quickstart_cpu"}[what]
    assert one in capsys.readouterr().out


def test_list_alone_lists_everything(capsys):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [*registries(), "recipes"]
    assert {"mate", "rotary_major", "quickstart_cpu"} <= {row["name"] for rows in found.values() for row in rows}
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    assert all(f"{what.upper()}\n" in told for what in found)


def test_show_prints_a_recipe_that_loads_again(capsys):
    assert main(["show", "model.depth=2", "--recipe", "quickstart_cpu", "train.lr=1e-3"]) == 0
    out = capsys.readouterr().out
    Path("filled.yaml").write_text(out)
    assert load_recipe("filled.yaml") == load_recipe("quickstart_cpu", ["model.depth=2", "train.lr=1e-3"])
    comments = [line for line in out.splitlines() if line.startswith("#")]
    told = "stage: videos, tokens: 9 (image) + 36 (video), steps: 60 (image) + 540 (video)"
    assert told in comments[1] and "GiB" in comments[1]
    assert "blocks.mixer: " in comments[-1]


def test_show_one_stage_as_json(capsys):
    assert main(["show", "--recipe", "t2v_68s", "--stage", "t2v_512_68s", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"]["stage"] == "t2v_512_68s" and shown["stages"][0]["tokens"]["video"] == 139_264
    assert shown["stages"][0]["trained"] == sum(shown["stages"][0]["parameters"].values())


def test_show_counts_the_steps_of_each_kind(capsys):
    words = ["data.mix_by=samples", "data.batch={image: 10, video: 1}", "train.steps=2002"]
    assert main(["show", "--recipe", "t2v_68s", "--stage", "t2v_512_17s", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["steps"] == {"image": 2, "video": 2000}


def test_show_an_autoencoders_recipe(capsys):
    assert main(["show", "--recipe", "tae_8x8x8", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["stage"] for one in shown["stages"]] == ["short", "detail"]
    assert [one["tokens"]["video"] for one in shown["stages"]] == [2 * 16**2, 2 * 32**2]
    assert shown["recipe"]["reconstruction"]["features"]["name"] == "vgg16"
    assert main(["show", "--recipe", "tae_8x8x8", "--stage", "detail", "reconstruction.features=lpips"]) == 0
    Path("filled.yaml").write_text(capsys.readouterr().out)
    assert load_recipe("filled.yaml", stage="detail").reconstruction.features == {"name": "lpips", "path": None}


def test_show_schema(capsys):
    assert main(["show", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["model"]["properties"]["dim"]["default"] == 384


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["model.detph=3"],
            ["command line: Key 'detph' not in 'LinGenConfig'. Did you mean 'depth'? (at model.detph)"],
        ),
        (["depth"], ["command line: 'depth' is no override; say key=value, e.g. model.depth=4."]),
        (["--stage", "video"], ["There is no stage called 'video'. Did you mean 'videos'? Known: images, videos."]),
        (
            ["train.lr=x", "model.mixer=mat"],
            [
                "command line: Expected a number, got 'x'. (at train.lr)",
                "command line: There is no mixer called 'mat'. Did you mean 'mate'? Known: attention, "
                "linear_attention, mamba2, mate, "
                "temporal_swin. To use your own, write 'module:Class'. (at model.mixer)",
            ],
        ),
    ],
)
def test_mistakes_are_one_plain_line_each(arguments, lines, capsys):
    assert main(["show", "--recipe", "quickstart_cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == lines and captured.out == ""


def test_a_mistake_in_a_file_names_its_line(capsys):
    Path("mine.yaml").write_text("model:\n  dim: 3.5\n")
    assert main(["show", "--recipe", "mine.yaml"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "mine.yaml:2: Expected a whole number, got 3.5. (at model.dim)"


@pytest.mark.parametrize(
    "arguments", [[], ["shwo"], ["list", "things"], ["list", "scans", "x=3"], ["show", "--recpie", "x"], ["show"]]
)
def test_wrong_use_is_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_flag_with_a_typing_mistake_is_told_with_the_nearest(capsys):
    assert main(["sample", "--run", "x", "--stpes=3"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("lingen sample: unrecognized arguments: --stpes=3. Did you mean '--steps'?")
    assert "lingen sample --help" in told and len(told.splitlines()) == 1


def test_help_is_a_word_as_well(capsys):
    assert main(["version"]) == 0 and capsys.readouterr().out.startswith("lingen ")
    assert main(["help"]) == 0
    assert "COMMAND" in capsys.readouterr().out
    assert main(["help", "sample"]) == 0
    assert "usage: lingen sample" in capsys.readouterr().out


def test_that_torch_is_imported_is_said_once_and_on_stderr():
    done = run_command("list", "mixers", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)) > 3
    assert done.stderr == "loading PyTorch ...\n"
    done = run_command("show", "--recipe", "quickstart_cpu", "model.detph=2")
    assert done.returncode == 2 and "PyTorch" not in done.stderr


@pytest.mark.parametrize("what", [*registries(), "recipes"])
def test_what_a_part_is_about_is_a_whole_sentence(what, capsys):
    assert main(["list", what, "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        about = row["about"]
        assert what == "scans" or about.endswith("."), about
        assert "\n" not in about and about.count("(") == about.count(")"), about


def test_interrupt(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "list", COMMANDS["list"]._replace(run=interrupted))
    assert main(["list", "scans"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m lingen list recipes --json | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_terminal_gets_tables():
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(
        lingen_command("show", "--recipe", "quickstart_cpu"), stdout=follower, cwd=ROOT, env=environment
    )
    os.close(follower)
    text = b""
    while chunk := _read(leader):
        text += chunk
    assert process.wait() == 0
    assert "─" in text.decode() and "# stage" not in text.decode()


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:  # Linux says so where the other end is closed
        return b""


@pytest.mark.slow
def test_recipes_are_found_in_a_wheel(tmp_path):
    pip = ["-m", "pip", "--quiet"]
    run_python(*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", "dist")
    (wheel,) = Path("dist").glob("lingen-*.whl")
    run_python(*pip, "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel))
    code = "import lingen, lingen.recipe.reading as r\n"
    code += "print(lingen.__file__, *r.shipped_recipes(), lingen.stages_of('t2v_68s'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    out = run_python("-c", code, env=environment)
    assert (
        out.startswith(str(tmp_path / "site")) and all(name in out for name in shipped_recipes()) and "quality" in out
    )
    assert OmegaConf.load(tmp_path / "site" / "lingen" / "recipes" / "t2v_68s.yaml").model.depth == 28
    empty = tmp_path / "empty"
    empty.mkdir()
    run_python("-m", "lingen", "demo", "a pig turns in the snow by day", "--steps", "1", cwd=empty, env=environment)
    short = ("stages.images.train.steps=1", "stages.videos.train.steps=1", "score.clips=0", "sample.prompts=[]")
    run_python("-m", "lingen", "fit", "--recipe", "quickstart_cpu", *short, "--run", "run", cwd=empty, env=environment)
    assert {one.name for one in empty.iterdir()} == {"demo.mp4", "demo.png", "run"}
    assert (empty / "run" / "report.html").is_file()
