"""The doctor: every missing weight in a line of its own, and the machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from lingen import doctor
from lingen.cli import main
from tests.helpers.chat import untaught

pytestmark = pytest.mark.usefixtures("here")


def test_every_missing_weight_of_the_main_recipe_has_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--recipe", "t2v_68s"]) == 1
    captured = capsys.readouterr()
    lines = Counter(captured.out.splitlines())
    assert [line for line in lines if line.startswith("missing: ")] == [
        "missing: tae weights/tae.safetensors",
        "missing: ul2 weights/ul2",
        "missing: byt5 weights/byt5-small",
        "missing: metaclip weights/metaclip-h14",
        "missing: llama weights/llama-3.1-8b-instruct",
    ]
    absent = [line for line in lines if line.startswith("absent: ")]
    assert absent == [
        "absent: data.shards.image shards/image/*.tar",
        "absent: data.shards.video shards/video/*.tar",
        "absent: data.shards.video shards/quality/*.tar",
    ]
    assert not [line for line in lines if line.startswith("note: ")]
    assert set(lines.values()) == {1} and len(lines) == 8
    cures = captured.err.splitlines()
    assert len(cures) == 8 and all(line.startswith("  ") for line in cures)
    for cure, line in zip(cures, lines, strict=True):
        assert line.split()[-1] in cure or line.startswith("missing: tae") and "Set autoencoder.path" in cure


def test_a_recipe_that_needs_nothing_is_ok(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--recipe", "quickstart_cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["ok: it needs no weights"] and captured.err == ""


def test_a_strategy_that_shards_is_a_note_and_no_failure(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]):
    words = ["doctor", "--recipe", str(tiny_recipe), "stages.clips.trainer.strategy=deepspeed"]
    assert main(words) == 0
    ok, note = capsys.readouterr().out.splitlines()
    assert ok == "ok: it needs no weights" and note.startswith("note: `lingen fit` refuses this: There is no ")
    assert main([*words, "--json"]) == 0
    assert [f"note: {one}" for one in json.loads(capsys.readouterr().out)["notes"]] == [note]
    assert main([*words, "--stage", "images", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_what_is_there_what_is_damaged_and_what_is_gone(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]):
    chat = untaught(Path("chat"))
    words = ["doctor", "--recipe", str(tiny_recipe), "rewrite.path=chat"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == ["ok: llama chat"]
    weights = chat / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main([*words, "init=nowhere", "stages.clips.data.shards.video=gone.tar"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "missing: llama chat",
        "missing: init nowhere",
        "absent: data.shards.video gone.tar",
    ]
    assert "model.safetensors is cut off" in captured.err and "no run folder or weights file" in captured.err
    assert main([*words, "init=nowhere", "stages.clips.data.shards.video=gone.tar", "--stage", "images", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["missing"]] == ["llama", "init"] and found["absent"] == []
    assert found["ok"] == []


def test_parts_are_called_as_in_their_registry(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]):
    words = ["doctor", "--recipe", str(tiny_recipe), "autoencoder=tae_small", "data.size=[32,32]"]
    assert main([*words, "model.patch=[1,1,1]", "--json"]) == 0
    (called,) = json.loads(capsys.readouterr().out)["ok"]
    assert called.startswith("tae_small ") and called.endswith("tae_small.safetensors")
    alone = [*words, "trains=autoencoder", "reconstruction.perceptual=0", "reconstruction.adversarial=0"]
    assert main([*alone, "train.ema=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] == [called]  # and nothing of the distance that is none


def test_init_that_holds_something_else_is_missing(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]):
    Path("other.safetensors").write_bytes(b"version https://")
    assert main(["doctor", "--recipe", str(tiny_recipe), "init=other.safetensors"]) == 1
    assert "missing: init other.safetensors" in capsys.readouterr().out.splitlines()


def test_settings_without_a_recipe_are_wrong_use(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "model.depth=2"]) == 2
    assert capsys.readouterr().err == "--stage and key=value change a recipe: say which, --recipe R.\n"


def test_the_machine(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    lines = [line.split(": ", 2) for line in capsys.readouterr().out.splitlines()]
    told = {what: (word, text) for word, what, text in lines}
    assert {word for word, _ in told.values()} <= {"ok", "note"}
    assert told["torch"][1].startswith(torch.__version__)
    fast = torch.cuda.is_available()
    assert (told["cuda:0"] if fast else told["cuda"])[0] == ("ok" if fast else "note")
    assert ("triton for scan" if fast else "chunked for scan") in told["kernels"][1]
    assert told["training steps"][1].startswith("train.compile=auto: CUDA" if fast else "train.compile=auto: no CUDA")
    assert told["libx264"][0] == "ok" and set(doctor.OPTIONAL) <= set(told)
    assert main(["doctor", "--json"]) == 0
    assert [one["what"] for one in json.loads(capsys.readouterr().out)] == list(told)


def test_little_disk_and_a_missing_package_are_notes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "LITTLE_DISK", float("inf"))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "nothing"})
    notes = {line.what: line.told for line in doctor.machine() if not line.ok}
    assert {"disk (here)", "disk (cache)", "no-such-package"} <= set(notes)
    assert notes["no-such-package"] == "not installed: nothing"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, doctor.Line]]:
    """Installs the metadata of a release of lightning before all others; returns what the doctor says then."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)

    def install(version: str) -> dict[str, doctor.Line]:
        info = site / f"lightning-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lightning\nVersion: {version}\n")
        return {line.what: line for line in doctor.machine()}

    return install


@pytest.mark.parametrize("version", doctor.MALWARE)
def test_a_lightning_that_is_malware_is_named_with_the_cure(
    installed: Callable[[str], dict[str, doctor.Line]], version: str
):
    line = installed(version)["lightning"]
    assert not line.ok and line.told.startswith(f"{version} is malware") and "GHSA-w37p-236h-pfx3" in line.told
    assert "pip install -U 'lightning>=2.5,!=2.6.2,!=2.6.3'" in line.told and "\n" not in line.told


def test_another_lightning_is_fine(installed: Callable[[str], dict[str, doctor.Line]]):
    assert installed("2.6.4")["lightning"] == doctor.Line(True, "lightning", "2.6.4")


def test_the_doctor_does_not_import_what_may_be_malware():
    code = "import sys; from lingen.cli import main; main(['doctor']); print('lightning' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert told.splitlines()[-1] == "False" and "ok: lightning: " in told


def test_no_dependency_accepts_the_malware():
    wanted = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    listed = [*wanted["dependencies"], *(one for some in wanted["optional-dependencies"].values() for one in some)]
    specifiers = {r.name: r.specifier for r in map(Requirement, listed)}
    assert not any(specifiers["lightning"].contains(version) for version in doctor.MALWARE)
    assert specifiers["lightning"].contains("2.6.6") and "pytorch-lightning" not in specifiers


def test_a_strategy_that_fit_refuses_is_noted(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--recipe", str(tiny_recipe), "trainer.strategy=deepspeed"]) == 0
    note = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    assert "`lingen fit` refuses this: There is no strategy called 'deepspeed'" in note
    assert "trainer.strategy=fsdp" in note
