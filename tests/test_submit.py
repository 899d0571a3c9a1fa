"""`lingen submit`: the script, what it asks SLURM for, and what it does when the ranks end."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from lingen.cli import main
from lingen.launch.options import (
    ClusterSettings,
    merged,
    read_options,
    read_settings,
    script_of,
    seconds_of,
    settings_file,
)
from lingen.plan.forecast import plan, signal_seconds
from lingen.recipe import load_recipe, load_stages
from lingen.recipe.errors import RecipeError
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, which is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    return settings_file()


def write_settings(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)


def options_of(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", "--dry-run", *words]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return script


# training


def test_a_dry_run_prints_a_task_a_rank_and_writes_nothing(tiny_recipe: Path, here: Path, capsys):
    before = sorted(here.rglob("*"))
    script = dry_run(
        capsys, "--recipe", str(tiny_recipe), "--nodes", "2", "--run", "r", "--time", "8:00:00",
        "trainer.devices=3", "data.workers=4", "--stage", "clips",
    )  # fmt: skip
    assert sorted(here.rglob("*")) == before
    assert options_of(script) == {
        "job-name": "lingen-r", "chdir": str(here), "output": f"{here}/r/submit/0001/%j.log", "open-mode": "append",
        "requeue": "", "time": "8:00:00", "nodes": "2", "ntasks-per-node": "3", "cpus-per-task": "5",
        "signal": "USR1@120",
    }  # fmt: skip
    assert "srun --kill-on-bad-exit=1 " in script and f"--recipe {here}/r/submit/0001/recipe.yaml" in script
    assert f"--run {here}/r --stage clips --preflight &" in script
    assert " --preflight" not in dry_run(capsys, "--recipe", str(tiny_recipe), "--no-preflight")


def test_gpus_are_asked_for_one_a_task(tiny_recipe: Path, capsys, own_settings: Path):
    words = ["--recipe", str(tiny_recipe), "trainer.accelerator=gpu", "--nodes", "4"]
    script = dry_run(capsys, *words, "--gpus-per-node", "8")
    assert {"gpus-per-node": "8", "ntasks-per-node": "8"}.items() <= options_of(script).items()
    other = options_of(dry_run(capsys, *words, "--gpus-per-node", "8", "--sbatch=--gres=gpu:fast:8 --mem=0"))
    assert "gpus-per-node" not in other and other["gres"] == "gpu:fast:8" and other["mem"] == "0"
    write_settings(own_settings, "gpus_per_node: 4\n")
    assert options_of(dry_run(capsys, *words, "trainer.devices=auto"))["ntasks-per-node"] == "4"
    own_settings.unlink()
    assert main(["submit", *words, "trainer.devices=auto"]) == 2
    assert "--gpus-per-node G" in capsys.readouterr().err


def test_the_users_file_and_the_command_line(tiny_recipe: Path, capsys, own_settings: Path):
    write_settings(
        own_settings,
        "sbatch: [--partition=slow, --account=mine]\nsrun: [--mpi=none]\nsetup: ['module load cuda']\n"
        "time: 1-0\nmax_requeues: 3\nsignal_seconds: 300\n",
    )
    words = ["--recipe", str(tiny_recipe), "--sbatch=--partition=fast"]
    script = dry_run(capsys, *words)
    assert {
        "partition": "fast", "account": "mine", "time": "1-0", "signal": "USR1@300"
    }.items() <= options_of(script).items()  # fmt: skip
    assert "\nmodule load cuda\n" in script and "srun --kill-on-bad-exit=1 --mpi=none " in script
    assert '"$restarts" -ge 3' in script
    script = dry_run(capsys, *words, "--max-requeues", "0", "--signal-seconds", "600", "--time", "90:00")
    assert options_of(script)["signal"] == "USR1@600" and '"$restarts" -ge 0' in script


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "2", "trainer.num_nodes=2"], "trainer.num_nodes is what --nodes says"),
        (["--gpus-per-node", "2"], "--gpus-per-node: the recipe trains on the CPU; trainer.devices=N"),
        (["--time", "1h"], "--time: '1h' is no time of SLURM"),
        (["--time", "2"], "--time 2: the signal to stop comes 120 s before the end"),
        (["--sbatch=-p fast"], "--sbatch: '-p' is no option of sbatch in its long form"),
        (["--sbatch=--nodes=3"], "--sbatch: --nodes is decided by --nodes; leave it out there."),
        (["model.detph=3"], "Did you mean 'depth'?"),
        (["--", "encode"], "A command behind -- goes with --array N"),
    ],
)
def test_mistakes_cost_nothing(words: list[str], told: str, tiny_recipe: Path, capsys):
    assert main(["submit", "--dry-run", "--recipe", str(tiny_recipe), *words]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.out == ""


def test_what_fit_would_refuse_is_refused_before_the_queue(tiny_recipe: Path, tiny_run: Path, here: Path, capsys):
    words = ["submit", "--recipe", str(tiny_recipe), "--run", "new", "data.shards.video=none-*.tar"]
    assert main(words) == 2
    assert "no file matches 'none-*.tar'" in capsys.readouterr().err and not Path("new").exists()
    assert main([*words, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("it would be refused: ") and captured.out.startswith("#!/bin/bash\n")
    assert main(["submit", "--recipe", str(tiny_recipe), "--run", str(tiny_run), "model.depth=3"]) == 2
    assert "holds a run of another recipe: model.depth is 3 here and 2 there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("partition: fast\n", "slurm.yaml:1: "),
        ("setup: []\nmax_requeues: -1\n", "slurm.yaml:2: "),
        ("sbatch: [--array=3]\n", "slurm.yaml: --array is decided by --array"),
        (
            "sbatch: []\ntime: 24:00:00\n",
            "slurm.yaml:2: 86400 is a number, as YAML reads a bare 24:00:00; put it in quotes.",
        ),
    ],
)
def test_a_mistake_in_the_users_file_has_its_line(text: str, told: str, own_settings: Path, tiny_recipe: Path, capsys):
    write_settings(own_settings, text)
    assert main(["submit", "--dry-run", "--recipe", str(tiny_recipe)]) == 2
    assert told in capsys.readouterr().err


def test_the_file_of_the_page_is_read(own_settings: Path):
    (text,) = re.findall(r"```yaml\n(sbatch: .*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    write_settings(own_settings, text)
    assert read_settings(own_settings).time == "24:00:00" and read_settings(own_settings).gpus_per_node == 8


def test_without_a_file_there_are_the_defaults(own_settings: Path):
    assert read_settings(own_settings) == ClusterSettings()


def test_times_of_slurm():
    times = {"90": 5400, "1:30": 90, "2:00:00": 7200, "1-6": 108_000, "1-6:30": 109_800, "1-06:30:01": 109_801}
    assert {time: seconds_of(time) for time in times} == times
    for wrong in ("", "0", "1-", "soon", "1:2:3:4"):
        with pytest.raises(RecipeError, match="no time of SLURM"):
            seconds_of(wrong)


def test_other_options_take_the_place_of_ours():
    own = {"requeue": None, "gpus-per-node": "8", "output": "a.log"}
    assert merged(own, read_options(["--gpus=64 --no-requeue"], "x"), read_options(["--output='b c.log'"], "x")) == {
        "gpus": "64", "no-requeue": None, "output": "b c.log"
    }  # fmt: skip


def test_the_signal_comes_early_enough_for_the_longest_step(tiny_recipe: Path):
    tiny = load_stages(tiny_recipe)
    assert signal_seconds(tiny, [plan(one) for one in tiny]) == 120
    long = load_recipe("t2v_68s", stage="t2v_512_68s")
    forecast = plan(long)
    seconds = signal_seconds([long], [forecast])
    step = forecast.training_flops["video"] / 165e12 / 0.25
    assert 2 * step + 16 * forecast.trained / 0.5e9 < seconds < 3600
    assert signal_seconds([load_recipe("t2v_68s", ["train.accumulate=8"], stage="t2v_512_68s")], [forecast]) > seconds


# what the script does when the ranks end

STANDS_IN = {
    "srun": 'exit "$CODE"',
    "lingen": 'exit "$JUDGED"',
    "squeue": '[ "$STATE" != silent ] && echo "$STATE"',
    "scontrol": '[ -e tried ] || [ "$STATE" != silent ] && echo "$@" >> asked || { touch tried; exit 1; }',
    "sleep": "exit 0",
}
"""What would have to be brought into odd states; tests/test_cluster.py has a real cluster."""


def end_with(code: int, *, state: str = "RUNNING", judged: int = 75, restarts: str | None = None) -> tuple[int, bool]:
    """Exit code of the script, and whether it put the job into the queue again."""
    script = script_of({}, ["x"], ClusterSettings(max_requeues=2), judge=["lingen", "status"])
    environment = {"PATH": f"{Path.cwd()}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "CODE": str(code)}
    environment |= {"STATE": state, "JUDGED": str(judged)} | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    for name, text in STANDS_IN.items():
        Path(name).write_text(f"#!/bin/bash\n{text}\n")
        Path(name).chmod(0o755)
    done = subprocess.run(["bash"], input=script, text=True, env=environment, timeout=60, capture_output=True)
    asked = Path("asked").read_text() if Path("asked").exists() else ""
    assert asked in ("", "requeue 7\n") and done.stderr == ""
    return done.returncode, bool(asked)


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ({"code": 75}, (75, True)),
        ({"code": 75, "judged": 1}, (1, False)),
        ({"code": 75, "restarts": "1"}, (75, True)),
        ({"code": 75, "restarts": "2"}, (75, False)),
        ({"code": 75, "state": "CANCELLED"}, (75, False)),
        ({"code": 75, "state": ""}, (75, False)),
        ({"code": 75, "state": "silent"}, (75, True)),
        ({"code": 0}, (0, False)),
        ({"code": 1, "judged": 1}, (1, False)),
        ({"code": 1}, (75, True)),
        ({"code": 2}, (2, False)),
        ({"code": 130}, (130, False)),
        ({"code": 137}, (75, True)),
        ({"code": 143, "judged": 143}, (143, False)),
    ],
)
def test_the_script_knows_when_to_go_on(how: dict, ends: tuple[int, bool]):
    assert end_with(**how) == ends


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_the_script_hands_signals_on_and_waits(name: str):
    """SLURM may send them to the script (`--signal=B:USR1@600`) or to the ranks."""
    text = f"trap 'sleep 0.2; exit 75' {name}; touch ready; while :; do sleep 0.01; done"
    script = script_of({}, ["bash", "-c", text], ClusterSettings(max_requeues=0))
    Path("srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    Path("srun").chmod(0o755)
    Path("squeue").symlink_to("/bin/true")
    twice = f"kill -{name} $job; kill -{name} $job"
    command = f"bash script & job=$!; until [ -e ready ]; do sleep 0.01; done; {twice}; wait $job"
    Path("script").write_text(script)
    environment = {**os.environ, "PATH": f"{Path.cwd()}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    assert subprocess.run(["bash", "-c", command], env=environment, timeout=60).returncode == 75


# job arrays


def test_an_array_shares_the_work_of_a_command(here: Path, capsys):
    words = ["encode", "--recipe", "tiny", "--out", "data/latents", "data.workers=0"]
    script = dry_run(capsys, "--array", "16", "--gpus-per-node", "1", "--time", "30", "--", *words)
    assert options_of(script) == {
        "job-name": "lingen-latents", "chdir": str(here), "output": f"{here}/data/latents-submit/0001/%A-%a.log",
        "open-mode": "append", "requeue": "", "time": "30", "array": "1-16", "ntasks": "1", "gpus-per-node": "1",
        "signal": "TERM@60",
    }  # fmt: skip
    assert f'-m lingen {" ".join(words)} --part "$SLURM_ARRAY_TASK_ID/16" &' in script


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--array", "4"], "lingen submit --array 8 -- encode"),
        (["--array", "4", "--", "fit", "--recipe", "x"], "--array shares the work of encode, data pack, data caption"),
        (["--array", "4", "--recipe", "x", "--", "encode", "--out", "x"], "--recipe stands before it"),
        (["--array", "4", "--", "encode", "--out", "x", "--part", "1/4"], "leave --part out"),
        (["--array", "4", "--", "data", "pack", "--recipe", "x"], "--out"),
    ],
)
def test_mistakes_of_an_array(words: list[str], told: str, capsys):
    assert main(["submit", "--dry-run", *words]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.out == ""
