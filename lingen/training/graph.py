"""A whole training step, from the forward pass to the averaged weights, as one CUDA graph for each kind and shape.

Small models wait for thousands of kernels to be launched one by one; a graph launches them at once. What a step tells
stays on the device and is read every few steps, so that the GPU never waits either: until then the device itself leaves
out a step that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lingen.data.batch import Batch
from lingen.frozen import is_trained
from lingen.recipe.errors import RecipeError
from lingen.training.health import Step

if TYPE_CHECKING:
    from lingen.training.base import Trained

T = TypeVar("T")
READ_EVERY = 16
"""Steps after which they are looked at, where no row and no checkpoint does that before [ours]."""
GRAPHS_MOST = 64
"""Graphs that are kept; steps of further shapes are launched kernel by kernel [ours]."""
HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
"""Of a callback: places within a step, where Python does not come by."""


def recorded(act: Callable[[], T], pool: Any) -> Callable[[], T]:
    """A function on tensors that stay where they are: on CUDA recorded as a graph, which a call plays; elsewhere the
    function itself.

    Args:
        act: what it returns is the same tensors at each call.
        pool: of memory, which graphs that do not run at the same time share; None: no graph."""
    if pool is None:
        return act
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Threads that pin batches and write checkpoints call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = act()
    finally:
        torch.cuda.set_stream(stream)  # torch leaves another one where it fails

    def play() -> T:
        graph.replay()
        return result

    return play


class Told(NamedTuple):
    """What a batch's part of a step gives."""

    loss: Tensor
    numbers: Tensor
    """The losses [b], then sums of the means [n 2], the sum of the step's losses and the norms of its gradients."""
    names: list[str]
    """Of the means."""
    rms: dict[str, Tensor]


class StepGraphs:
    """Runs the steps of a module: the first one of a shape kernel by kernel, which compiles and allocates what is
    needed, the second one is recorded, and from then on it is played.

    Args:
        module: a denoiser on its device, with its average, optimiser and schedule."""

    def __init__(self, module: Any):
        self._module = module
        self._optimizer: torch.optim.Optimizer = module.trainer.optimizers[0]
        device = module.device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.records = True
        """Until a step cannot be recorded."""
        self._known: dict[Any, tuple[Any, Callable[[], Told]] | None] = {}
        """Kind, shapes and place in the step -> the tensors that are read, and what reads them; None: seen once."""
        self._rates = [torch.zeros((), device=device) for _ in self._optimizer.param_groups]
        self._total = torch.zeros((), device=device)
        self._sums: dict[nn.Parameter, Tensor] = {}
        """Gradients of the batches of a step, where there are several."""
        self._shares = torch.zeros(READ_EVERY, device=device)
        """Of the average's next updates; which of them is next."""
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._waiting: list[tuple[list[str], Told, Step | None]] = []
        """Of each batch that nobody has looked at yet its samples, what it tells, and the step that it ends."""
        self._look_ahead()

    def step(self, batch: Batch, number: int, tokens: int) -> Tensor:
        """Trains on a batch; the mean loss, which is overwritten by the next step.

        Args:
            number: of the batch, as Lightning counts them.
            tokens: of the batch.
        """
        module, accumulate = self._module, self._module.recipe.train.accumulate
        place = (number % accumulate == 0, (number + 1) % accumulate == 0)
        inputs = module.read(batch)
        if place[1]:
            module.note_rate(self._optimizer)
            for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])
        begun = module.pace.mark()
        with torch.autocast(module.device.type, enabled=False):  # Lightning's: it is for the forward pass alone
            told = self._told(batch.kind, inputs, place)
        module.pace.end(begun)
        module.note(batch, told.numbers[: len(batch.keys)], tokens)
        module._seen.clear()
        step = module.step_of([], 0.0, ()) if place[1] else None
        self._waiting.append((batch.keys, told._replace(numbers=told.numbers.clone()), step))
        if place[1] and sum(step is not None for _, _, step in self._waiting) >= READ_EVERY:
            self.settle()
        return told.loss

    def settle(self) -> None:
        """Reads what the steps since the last call tell, and judges them in their order."""
        module, seen, waiting = self._module, [], self._waiting
        if not waiting:
            return
        self._waiting = []
        all_numbers = torch.cat([told.numbers for _, told, _ in waiting]).cpu()
        sizes = [len(told.numbers) for _, told, _ in waiting]
        for (keys, told, step), numbers in zip(waiting, all_numbers.split(sizes), strict=True):
            losses, sums, rest = numbers.tensor_split([len(keys), len(keys) + 2 * len(told.names)])
            seen.append((keys, losses))
            module.meter.give(told.names, sums.view(-1, 2))
            if step is None:
                continue
            total, *norms = rest.tolist()
            module.pace.step()
            count = sum(len(samples) for samples, _ in seen)
            module.average.updates += module.judge(step._replace(seen=seen, loss=total / count, norms=norms))
            seen = []
        self._look_ahead()

    def _look_ahead(self) -> None:
        average = self._module.average
        self._shares.copy_(torch.tensor([average.share(average.updates + n) for n in range(READ_EVERY)]))
        self._next.zero_()

    def _told(self, kind: str, inputs: Any, place: tuple[bool, bool]) -> Told:
        """Does a batch's part of a step, by its graph where there is one."""
        module = self._module
        key = (kind, place, module.rms is not None, *(one.shape for one in inputs.tensors()))
        if key in self._known and self._known[key] is None and self.records:
            self._record(key, kind, inputs, place)
        known = self._known.get(key)
        if known is None:
            return self._first(key, kind, inputs, place)
        for kept, one in zip(known[0].tensors(), inputs.tensors(), strict=True):
            kept.copy_(one)
        told = known[1]()
        if module.rms is not None:
            module.rms = told.rms
        return told

    def _first(self, key: Any, kind: str, inputs: Any, place: tuple[bool, bool]) -> Told:
        """Kernel by kernel. A part that draws random numbers of the GPU would draw others in a graph."""
        on_gpu = self._pool is not None and key not in self._known
        before = torch.cuda.get_rng_state() if on_gpu else None
        told = self._act(kind, inputs, place)
        if before is not None and not torch.equal(before, torch.cuda.get_rng_state()):
            self._give_up("a part of the model draws random numbers of its own")
        self._known.setdefault(key, None)
        return told

    def _record(self, key: Any, kind: str, inputs: Any, place: tuple[bool, bool]) -> None:
        if sum(one is not None for one in self._known.values()) >= GRAPHS_MOST:
            return
        kept, fault = inputs.copy(), self._too_large()
        try:
            if fault is None:
                self._known[key] = (kept, recorded(lambda: self._act(kind, kept, place), self._pool))
                return
        except RuntimeError as error:
            fault = f"{culprit(error, self._module)} cannot be recorded ({' '.join(str(error).split())[:200]})"
            for parameter in self._parameters():
                parameter.grad = None
            self._module.meter.take()
        self._give_up(fault)

    def _give_up(self, fault: str) -> None:
        if self.records:
            refuse_graphs(self._module, fault)
        self.records = False

    def _too_large(self) -> str | None:
        """Where the choice is ours: a step that fills the GPU has no need of a graph, which holds its memory."""
        if self._pool is None or self._module.recipe.train.compile == "graph":
            return None
        used, room = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        return f"a step takes {used / 2**30:.0f} of {room / 2**30:.0f} GiB" if used > room / 2 else None

    def _act(self, kind: str, inputs: Any, place: tuple[bool, bool]) -> Told:
        """A batch's part of a step: what is recorded. Nothing here reads a number of the device."""
        module, (first, last) = self._module, place
        with module.trainer.precision_plugin.forward_context():
            losses = module.losses_at(kind, inputs)
        loss = losses.mean()
        (loss / module.recipe.train.accumulate).backward()
        names, sums = zip(*module.meter.take(), strict=True)
        self._total.copy_(losses.detach().sum()) if first else self._total.add_(losses.detach().sum())
        if not (first and last):
            self._add_gradients(first, last)
        norms = self._update() if last else []
        numbers = torch.cat([losses.detach(), *sums, torch.stack([self._total, *norms]).to(losses)])
        return Told(loss.detach(), numbers, list(names), dict(module.rms or {}))

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])

    def _add_gradients(self, first: bool, last: bool) -> None:
        """Keeps the gradients of a step's batches outside of the graphs' memory; the last batch gets the sums."""
        for parameter in self._parameters():
            if parameter.grad is None:
                continue
            if parameter not in self._sums:
                self._sums[parameter] = torch.empty_like(parameter.grad)
            kept = self._sums[parameter]
            kept.copy_(parameter.grad) if first else kept.add_(parameter.grad)
            parameter.grad = kept if last else None

    def _update(self) -> list[Tensor]:
        """Clips, moves weights and average unless something is not finite, and forgets the gradients; the norms."""
        module, optimizer = self._module, cast(Any, self._optimizer)
        norms = module.clip()
        is_finite = torch.stack([self._total, *(norm.to(self._total) for norm in norms)]).isfinite().all()
        with self._on_device(optimizer):
            optimizer.found_inf = (~is_finite).float()
            optimizer.step()
            del optimizer.found_inf
        module.average.move(self._shares.gather(0, self._next)[0] * is_finite)
        self._next.add_(is_finite)
        for parameter in self._parameters():
            parameter.grad = None
        return norms

    @contextmanager
    def _on_device(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside the block the learning rates are those of the device, which change between two plays of a graph."""
        before = [dict(group) for group in optimizer.param_groups]
        recorded = self._pool is not None and torch.cuda.is_current_stream_capturing()
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group |= {"lr": rate, "capturable": recorded}  # torch warns of what is capturable and not recorded
        try:
            yield
        finally:
            for group, old in zip(optimizer.param_groups, before, strict=True):
                group.clear()
                group |= old


def graphs_of(module: Trained) -> StepGraphs | None:
    """What runs the steps of a module that is about to be trained, where `train.compile` asks for graphs and nothing
    forbids them. RecipeError where it insists on them."""
    asked = module.recipe.train.compile
    if asked == "off" or (asked == "auto" and module.device.type != "cuda"):
        return None
    fault = what_forbids_graphs(module)
    if fault is not None:
        refuse_graphs(module, fault)
        return None
    return StepGraphs(module)


def refuse_graphs(module: Trained, fault: str) -> None:
    """Says why there are no graphs; RecipeError where the recipe insists on them."""
    if module.recipe.train.compile == "graph":
        raise RecipeError(f"A step cannot be a CUDA graph: {fault}. Set train.compile=auto or off.")
    module.say(f"steps are no CUDA graphs (train.compile=auto): {fault}")


def fused_here(module: Trained) -> bool:
    """Whether AdamW, or the part of Muon that is AdamW, is one kernel, which may be part of a graph: on a GPU, with or
    without one. On a CPU one process would read the rate in float32, and ranks would not."""
    is_wanted = module.device.type == "cuda" or module.recipe.train.compile == "graph"
    return is_wanted and cast(Any, module)._trainer is not None and _what_forbids_fused(module) is None


def _what_forbids_fused(module: Trained) -> str | None:
    trainer, settings = cast(Any, module.trainer), module.recipe.train
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        return f"trainer.strategy={module.recipe.trainer.get('strategy', 'auto')} is for several ranks"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:  # such a scaler hides the gradients
        return f"trainer.precision={module.recipe.trainer['precision']} scales gradients"
    if settings.optimizer["name"] not in ("adamw", "muon"):
        return f"train.optimizer is {settings.optimizer['name']}"
    return None


def what_forbids_graphs(module: Trained) -> str | None:
    """What forbids graphs, in words; None: nothing that is known before a step is recorded."""
    trainer, settings = cast(Any, module.trainer), module.recipe.train
    if not hasattr(module, "losses_at"):
        return "an autoencoder is trained"
    if module.device.type not in ("cuda", "cpu"):
        return f"trainer.accelerator is {module.device.type}"
    if (fault := _what_forbids_fused(module)) is not None:
        return fault
    if settings.on_spike == "skip":
        return "train.on_spike=skip looks at each step before it is taken"
    for number, encoder in enumerate(cast(Any, module).text):
        if is_trained(encoder) and not hasattr(encoder, "read_ids"):
            return f"the trained text encoder {module.recipe.text[number]['name']} has no `read_ids`"
    for one in trainer.callbacks:
        for hook in HOOKS:
            if getattr(type(one), hook) is not getattr(Callback, hook) or hook in vars(one):
                return f"the callback {type(one).__name__} has `{hook}`"
    for name, part in module.named_modules():
        if any(getattr(part, f"_{of}_hooks") for of in ("forward", "forward_pre", "backward", "backward_pre")):
            return f"{name} ({type(part).__name__}) has a hook"
    return None


def culprit(error: BaseException, module: nn.Module) -> str:
    """The innermost part in whose forward pass an error came up; the end of a recording fails once more."""
    while error.__context__ is not None:
        error = error.__context__
    names, trace, found = {id(part): name for name, part in module.named_modules()}, error.__traceback__, "a step"
    while trace is not None:
        part = trace.tb_frame.f_locals.get("self")
        if names.get(id(part)):
            found = f"{names[id(part)]} ({type(part).__name__})"
        trace = trace.tb_next
    return found
