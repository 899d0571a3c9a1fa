"""The page of `lingen ui`, as people use it in headless Chromium; and its hook, which needs no gradio."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lingen
from lingen.cli import main
from lingen.media import read_video
from lingen.recipe.errors import RecipeError
from lingen.sampling.notes import read_notes
from lingen.sampling.ui import Watch, models_in
from tests.helpers.commands import lingen_command, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_hook_sees_the_clip_and_changes_no_bit(tiny_run: Path):
    watch, told = Watch(), []
    watch.bar = told.append
    frames = next(lingen.generate(tiny_run, "a red square", steps=3, progress=watch))
    assert np.array_equal(frames, next(lingen.generate(tiny_run, "a red square", steps=3)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert watch.frame.shape == (96, 96, 3) and watch.frame.std() > 1  # enlarged from 8 x 8


def test_what_it_sees_last_is_the_clip(tiny_run: Path):
    class Last(Watch):
        def show(self, autoencoder: Any, latents: Any) -> None:
            self.frame = latents

    watch = Last()
    watch.bar = lambda steps: None
    module = lingen.load_model(tiny_run)
    frames = next(lingen.generate(module, "a red square", steps=1, progress=watch))
    pixels = ((watch.frame[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    assert torch.equal(pixels, torch.from_numpy(frames[0]))


def test_stop_leaves_the_sampler(tiny_run: Path):
    watch = Watch()
    watch.bar = lambda steps: setattr(watch, "stopped", True)
    with pytest.raises(RecipeError, match="Stopped"):
        next(lingen.generate(tiny_run, "a red square", steps=3, progress=watch))


def test_models_are_finished_runs_of_denoisers(tiny_run: Path, tmp_path: Path):
    (tmp_path / "one").symlink_to(tiny_run)
    shutil.copytree(tiny_run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("weights.safetensors"))
    (tmp_path / "other").mkdir()
    assert [name for name, _ in models_in(tmp_path) if "built in" not in name] == ["one"]


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_the_cure_is_said(capsys: pytest.CaptureFixture[str]):
    assert main(["ui"]) == 2
    assert 'pip install "gradio>=6"' in capsys.readouterr().err


@pytest.fixture
def address(tiny_run: Path, tmp_path: Path) -> Iterator[str]:
    """Where `lingen ui` answers."""
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install '.[ui]'")
    (tmp_path / "runs").mkdir()
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    words = lingen_command("ui", "--port", port)
    with subprocess.Popen(words, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}"), process)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_two_tabs_make_stop_and_make_again(address: str, tiny_run: Path, tmp_path: Path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the path")
    made = tmp_path / "clips"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        one, two = (opened(browser, address) for _ in range(2))
        elsewhere: list[str] = []
        for page in (one, two):
            page.on("request", lambda asked: elsewhere.append(asked.url))
            page.get_by_label("Prompt").fill("a red square")
        one.get_by_label("Seed").fill("3")
        one.get_by_role("button", name="Make", exact=True).click()
        one.locator("video").first.wait_for()
        (first,) = made.glob("*.mp4")
        assert read_notes(first).settings.seed == 3
        two.get_by_label("Seconds").fill("2000")  # too long to end before it is stopped
        two.get_by_role("button", name="Make", exact=True).click()
        one.get_by_role("button", name="Make", exact=True).click()
        one.get_by_text("queue").first.wait_for()  # one at a time
        two.get_by_role("button", name="Stop").click()
        one.wait_for_function("document.querySelectorAll('.thumbnail-item').length == 2")
        one.locator(".thumbnail-item").nth(1).click()
        again = one.get_by_role("button", name="Make the chosen clip again")
        sync_api.expect(again).to_be_enabled()
        assert one.get_by_label("Seed").input_value() == "3" and one.get_by_label("Height").input_value() == "8"
        again.click()
        one.wait_for_function("document.querySelectorAll('.thumbnail-item').length == 3")
        browser.close()
    assert not [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))]
    clips = [read_video(file.read_bytes())[0] for file in sorted(made.glob("*.mp4"))]
    assert len(clips) == 3 and all(np.array_equal(clips[0], clip) for clip in clips)


def opened(browser: Any, address: str) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(address)
    page.wait_for_function("[...document.querySelectorAll('input')].some((one) => one.value == 'tiny')")
    page.wait_for_function("[...document.querySelectorAll('input')].some((one) => one.value == '0.5')")  # seconds
    return page
