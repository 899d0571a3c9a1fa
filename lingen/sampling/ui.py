"""The page of `lingen ui`: clips are made on this machine, shown while they come, and made again from their notes."""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lingen.media import enlarged
from lingen.recipe.errors import RecipeError
from lingen.sampling import clips
from lingen.sampling.files import sample_again, sample_to_files
from lingen.sampling.notes import read_notes
from lingen.training.weights import recipe_of
from lingen.weights import BUILT_IN, find_weights

NEWEST, PREVIEW_SECONDS = 24, 0.5
"""Clips of the gallery; the least time between two previews."""


class Watch:
    """The sampler's progress hook of one tab: it keeps a preview, and leaves where Stop was pressed."""

    bar: Any
    frame: Any = None
    stopped, shown = False, 0.0

    def __call__(self, done: int, steps: int) -> None:
        if self.stopped:
            raise RecipeError("Stopped.")
        self.bar((done, steps))

    def show(self, autoencoder: Any, latents: Any) -> None:
        """Keeps a frame of the middle of latents [c t h w]."""
        if time.monotonic() - self.shown > PREVIEW_SECONDS:
            middle = latents[:, latents.shape[1] // 2 :][:, :1]
            self.frame = enlarged(next(clips.decode_frames(autoencoder, middle, 1)))
            self.shown = time.monotonic()


def models_in(runs: Path) -> list[tuple[str, str]]:
    """Name and path of what makes clips: what comes with lingen, and the finished runs in a folder."""
    finished = sorted({file.parents[2] for file in runs.glob("*/stages/*/weights.safetensors")})
    own = [run for run in finished if "\ntrains: autoencoder" not in (run / "recipe.yaml").read_text(encoding="utf-8")]
    found = {f"{name} (built in)": file for name, file in BUILT_IN.items() if file.is_file()}
    return [(name, str(path)) for name, path in (found | {run.name: run for run in own}).items()]


def open_page(runs: Path, out: Path, port: int, say: Callable[[str], None]) -> None:
    """Serves the page to this machine alone until it is interrupted; one clip is made at a time, whatever the number of
    tabs, each written into `out`. RecipeError where no run is finished, or the port is taken. `say` gets its address.
    """
    import gradio as gr

    if not models_in(runs):
        raise RecipeError(f"No run in {runs} is finished: train one with `lingen fit`, or name a folder with --runs.")
    alone = threading.Lock()

    def make(watch: Watch, old: str, model: str, prompt: str, seed: int, seconds: float, height: int, width: int,
             guidance: float, bar: Any = gr.Progress()) -> tuple[str, list[str]]:  # fmt: skip  # noqa: B008
        with alone:
            path, watch.bar, watch.stopped = out / f"ui-{time.time_ns()}.mp4", bar, False
            how: Any = {"seed": seed, "guidance": guidance, "seconds": seconds, "size": (height, width)}
            try:
                if old:
                    sample_again(old, path, progress=watch)
                else:
                    next(sample_to_files(model, [prompt], path, progress=watch, **how))
            except ValueError as error:
                raise gr.Error(str(error), title="No clip", print_exception=False) from error
        return str(path), newest()

    def newest() -> list[str]:
        return [str(file) for file in sorted(out.glob("ui-*.mp4"))[: -NEWEST - 1 : -1]]

    def usual(model: str) -> list[Any]:
        recipe = recipe_of(find_weights(model))
        return [recipe.sample.seed, recipe.data.frames / recipe.data.fps, *recipe.data.size, recipe.sample.guidance]

    def chosen(shown: list[tuple[str, str]], event: gr.SelectData) -> list[Any]:
        clip = read_notes(path := shown[event.index][0])
        told = {"recipe": clip.recipe, "stage": clip.stage, "weights": clip.weights, **asdict(clip.settings)}
        how = [clip.prompt, clip.settings.seed, clip.frames / clip.fps, *clip.size, clip.settings.guidance]
        return [path, *how, told, gr.Button(interactive=True)]

    with gr.Blocks(title="lingen", analytics_enabled=False) as page:
        watch, new, old = gr.State(Watch), gr.State(""), gr.State("")
        gr.Markdown("# lingen")
        with gr.Row():
            with gr.Column():
                model, prompt = gr.Dropdown(label="Model"), gr.Textbox(label="Prompt", lines=2)
                with gr.Row():
                    whole = {"Seed": 0, "Seconds": None, "Height": 0, "Width": 0, "Guidance": None}
                    numbers = [gr.Number(label=name, precision=digits, min_width=60) for name, digits in whole.items()]
                with gr.Row():
                    go, stop = gr.Button("Make", variant="primary"), gr.Button("Stop", variant="stop")
            preview = gr.Image(label="Preview", interactive=False, height=340, buttons=[], elem_id="preview")
            film = gr.Video(label="Clip", autoplay=True, loop=True, interactive=False, height=340)
        shelf = gr.Gallery(newest, label="Clips", columns=8, height=220, allow_preview=False, fit_columns=False)
        again = gr.Button("Make the chosen clip again", interactive=False)
        about = gr.JSON(label="What made the chosen clip", max_height=240)
        one: Any = {"concurrency_limit": 1, "concurrency_id": "sampler", "show_progress_on": film}
        for button, past in ((go, new), (again, old)):
            job = button.click(make, [watch, past, model, prompt, *numbers], [film, shelf], **one)
            stop.click(lambda watch: setattr(watch, "stopped", True), watch, cancels=job, queue=False)
        shelf.select(chosen, shelf, [old, prompt, *numbers, about, again])
        model.change(usual, model, numbers)
        gr.Timer(PREVIEW_SECONDS).tick(lambda watch: watch.frame, watch, preview, queue=False, show_progress="hidden")
        page.load(lambda: gr.Dropdown(known := models_in(runs), value=known[0][1]), None, model)
    css = "#preview img {width: 100%; height: 100%; object-fit: contain}"
    try:
        shown: Any = {"allowed_paths": [str(out)], "footer_links": [], "css": css, "quiet": True}
        page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, **shown)
    except OSError as error:
        raise RecipeError(f"Nothing can listen at port {port}: another page, say. Name another --port.") from error
    say(f"http://127.0.0.1:{port} (Ctrl-C ends it)")
    page.block_thread()
