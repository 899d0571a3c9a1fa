"""The lightning.Trainer of a stage: the recipe's arguments and those that lingen sets."""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lingen.plan.forecast import largest_batch
from lingen.plan.trainer import listed, logger_of
from lingen.ranks.environment import here
from lingen.ranks.launch import RankEnvironment
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import CALLBACKS
from lingen.recipe.sections import Component, Recipe
from lingen.run_folder.folder import RunFolder
from lingen.training.strategy import Sharded, strategy_of

NUMBERS_OF_ONE_THREAD = 2**17
"""Tokens of a batch times width up to which a second thread does not pay: of 55,296 (quickstart_cpu) two threads took
158 ms a step and one 160, with 0.55 of the time of processors [ours]."""


def build_trainer(recipe: Recipe, folder: RunFolder, callbacks: list[Callback]) -> lightning.Trainer:
    """lightning.Trainer with the recipe's arguments and what lingen sets. The recipe's callbacks come first, so that a
    checkpoint holds them as they are after its step. RecipeError where Lightning refuses what the recipe asks for."""
    arguments = dict(recipe.trainer) | {"strategy": strategy_of(recipe)}
    callbacks = [*map(CALLBACKS.build, arguments.pop("callbacks", None) or []), *callbacks]
    loggers = [build_logger(one, folder) for one in listed(arguments.pop("logger", "tensorboard"))]
    settings = recipe.train
    batches = settings.steps * settings.accumulate
    every = settings.validate_every * settings.accumulate or batches
    if isinstance(arguments["strategy"], Sharded):
        arguments.setdefault("inference_mode", False)  # gathered weights are written again when training goes on
    with warnings.catch_warnings():
        quiet_lightning()
        try:
            trainer = lightning.Trainer(
                **arguments, plugins=[RankEnvironment()], max_steps=settings.steps, max_epochs=-1, min_epochs=0,
                accumulate_grad_batches=settings.accumulate, val_check_interval=min(every, batches),
                check_val_every_n_epoch=None, num_sanity_val_steps=0, log_every_n_steps=1, logger=loggers,
                callbacks=callbacks, default_root_dir=folder.path, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            )  # fmt: skip
        except (MisconfigurationException, ValueError, RuntimeError) as error:  # no such accelerator here, say
            raise RecipeError(f"{error} (at trainer)") from error
    if {trainer.world_size, trainer.num_devices * trainer.num_nodes} != {(ranks := here().ranks)}:
        raise RecipeError(
            f"{ranks} ranks train, but trainer.strategy={recipe.trainer.get('strategy', 'auto')} makes "
            f"{trainer.world_size} of them (trainer.devices, trainer.num_nodes). Set trainer.strategy=ddp."
        )
    # Its handler of SIGTERM would end the other ranks and wait for them inside of the handler; we listen ourselves.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


@contextmanager
def few_threads(recipe: Recipe) -> Iterator[None]:
    """In the block one thread computes, where a denoiser's step on the CPU is so small that a second one takes as much
    time as it saves. Not where OMP_NUM_THREADS says how many."""
    before, on_cpu = torch.get_num_threads(), recipe.trainer.get("accelerator") == "cpu"
    if on_cpu and recipe.subject.encoded and "OMP_NUM_THREADS" not in os.environ:
        kind, grid = largest_batch(recipe)
        if getattr(recipe.data.batch, kind) * math.prod(grid) * recipe.model.dim <= NUMBERS_OF_ONE_THREAD:
            torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def end_only(trainer: lightning.Trainer) -> None:
    """For a stage that is trained to its last step, but was stopped before its end: `fit` calls the hooks of the start
    and the end of training, which Lightning would leave out."""
    loop = trainer.fit_loop

    def run() -> None:
        loop.on_run_start()
        loop.on_run_end()

    loop.run = run  # type: ignore[method-assign]


def build_logger(component: str | Component, folder: RunFolder) -> Logger:
    """Any Lightning logger: a short name or ``module:Class``, with its own arguments. RecipeError where it refuses."""
    name, made_by, settings = logger_of(component)
    if name == "tensorboard":
        settings = {"save_dir": str(folder.path), "name": "tensorboard", "version": ""} | settings
    try:
        return made_by(**settings)
    except (ImportError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise RecipeError(f"The logger '{name}' cannot be built: {told} (at trainer.logger)") from error


def quiet_lightning() -> None:
    """Silences advice that does not apply: the loader is endless by design, and its workers are a setting."""
    texts = ("does not have many workers", "`srun` command is available", "max_epochs", "GPU available but not used")
    for text in (*texts, "in eval mode", "isinstance.treespec", "Total length of"):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    if not os.environ.get("LINGEN_DEBUG"):
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
