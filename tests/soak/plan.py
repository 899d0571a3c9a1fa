"""`lingen plan` over all that is shipped, and beside what a GPU measures."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch

from lingen.data.batch import Batch
from lingen.launch.resources import resource_rows
from lingen.plan.forecast import largest_batch, text_tokens
from lingen.recipe import load_curriculum, load_recipe
from lingen.recipe.reading import shipped_recipes
from lingen.recipe.sections import Recipe
from lingen.run_folder.folder import RunFolder
from lingen.training.dry_run import step_memory
from lingen.training.trainer import build_trainer

RANKS = (1, 2, 8, 64, 512)
ALONE = ("trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto", "trainer.accelerator=gpu")
QUIET = ("sample.prompts=[]", "train.validate_every=0", "train.sample_every=0", "data.workers=0", "train.log_every=1")


def plan_all() -> int:
    """Prints a line for each shipped stage and number of ranks."""
    for name in shipped_recipes():
        stages = load_curriculum(name).stages
        for ranks in RANKS:
            begun = time.monotonic()
            for row in resource_rows(stages, ranks, "h100-80", 0.4):
                print(json.dumps({"recipe": name, **row}), flush=True)
            print(f"# {name} on {ranks} ranks: {time.monotonic() - begun:.0f} s", flush=True)
    return 0


class Steps(torch.utils.data.IterableDataset):
    """The largest batch of a stage as encoded shards give it, again and again."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe

    def __iter__(self) -> Iterator[Batch]:
        kind, grid = largest_batch(self.recipe)
        model, rows = self.recipe.model, getattr(self.recipe.data.batch, kind)
        size = [tokens * patch for tokens, patch in zip(grid, model.patch, strict=True)]
        widths = enumerate(zip(text_tokens(self.recipe), model.text_dims, strict=True))
        text = {number: (torch.randn(rows, n, width), torch.ones(rows, n).bool()) for number, (n, width) in widths}
        for step in count():
            latents, slots = torch.randn(rows, model.channels, *size), torch.arange(rows) + step * rows
            names = [f"{step}:{row}" for row in range(rows)]
            fps = self.recipe.data.fps if kind == "video" else 0.0
            yield Batch(kind, step, latents, names, fps, names, names, slots, [], [], text, text)


def compare_peak(folder: Path, stage: str, steps: int, overrides: list[str]) -> int:
    """Trains the largest batch of a stage for a few steps on one GPU, by the real module, Trainer and optimiser, and
    prints what the allocator gave out at most beside the dry run, as JSON. Reads neither shards nor weights."""
    words = [*ALONE, *QUIET, f"stages.{stage}.train.steps={steps}", f"stages.{stage}.train.warmup=1", *overrides]
    recipe = load_recipe("t2v_68s", words, stage=stage)
    begun = time.monotonic()
    memory = step_memory(recipe)
    took = time.monotonic() - begun
    told = {"stage": stage, "overrides": overrides, "dry_run": dataclasses.asdict(memory), "seconds": took}
    print(json.dumps(told), flush=True)
    trainer = build_trainer(recipe, RunFolder(folder), [])
    with torch.device("cuda"):
        module = recipe.subject.build_module(recipe)
    torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, torch.utils.data.DataLoader(Steps(recipe), batch_size=None))
    measured = torch.cuda.max_memory_allocated()
    told |= {"measured": measured, "reserved": torch.cuda.max_memory_reserved(), "ratio": memory.peak / measured}
    print(json.dumps(told), flush=True)
    return 0 if abs(told["ratio"] - 1) < 0.1 else 1
