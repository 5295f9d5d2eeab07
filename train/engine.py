"""The training loop, on Hugging Face Accelerate; blind to the task.

The same text runs one process or many (torchrun, accelerate launch). A step is defined by the total batch: every process puts
its slice through the model in micro-batches, each loss weighted by its share of the step's valid targets, so the gradient is
that of the mean over the whole batch however it was cut. Sample order, augmentation and dropout are functions of (seed, step),
so a run that was killed goes on as if it had not been.
"""

import contextlib
import dataclasses
import errno
import json
import math
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast, send_to_device
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import backbones.edits
import weights
from train import checkpoint, loader, optim, sharding, syncbn, visualize
from train import config as configuration
from train.checks import RunError
from train.damaged import Damaged
from train.data import open_split
from train.data.check import refuse
from train.inference import Predictor
from train.log import Log, curves
from train.schema import Config, InferConfig
from train.tasks import Task
from train.tasks.base import Names
from train.transforms import Seeded, build_transform, describe_evaluation

RUN_FILES = ("config.yaml", "log.csv", "metrics.csv", "tensorboard", "checkpoints", "model.safetensors", "last.safetensors")
RUN_FILES += ("summary.json", "curves.png", "predictions.png")


@dataclass
class State:
    """Progress of a run. step: updates made; best, best_step: of the task's `best` metric."""

    step: int = 0
    best: float | None = None
    best_step: int = 0


def fit(config: Config, resume: bool = False, accept_changes: bool = False) -> dict[str, Any]:
    """Trains, evaluates and saves the run that `config` describes; returns its summary.

    resume: go on from the newest intact checkpoint of the run folder (from the start if there is none); accept_changes: even if
    the config differs from the folder's. The summary has "best" and "last" metrics, "best_step", "step", "seconds" and
    "stopped", which is True after SIGTERM or a first SIGINT.
    """
    accelerator = start(config)
    say = accelerator.print
    folder = Path(config.run.dir)
    check_folder(folder, config, resume, accept_changes)
    loader.seed_all(config.run.seed)
    task = configuration.build_task(config)
    train_set, val_set = dataset(config, task, "train"), dataset(config, task, "val")
    damaged = Damaged(config.data.skip_unreadable, {"train": train_set.dataset, "val": val_set})
    refuse([train_set.dataset, val_set])
    net = build(config, task, say).to(accelerator.device)
    average = optim.averaged(net, config.optim)
    if config.run.sync_batchnorm and accelerator.num_processes > 1:
        syncbn.synchronise(net)
    sharded = config.run.parallel == "fsdp" and accelerator.num_processes > 1
    if sharded:
        sharding.shard(net, accelerator.device)
        if average:
            sharding.shard(average.module, accelerator.device)
            average.foreach = False  # split parameters and plain buffers do not mix in one call
    if config.run.compile:
        net.compile()
    optimizer = optim.optimizer(net, config.optim)
    world, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    images = config.optim.global_batch
    pass_steps = len(train_set) / images
    steps = config.optim.steps or math.ceil(config.optim.epochs * pass_steps)
    eval_every = config.run.eval_every or max(1, steps // 10)
    save_every = config.run.save_every or eval_every
    schedule = optim.schedule(optimizer, config.optim, steps, pass_steps)
    optimizer = accelerator.prepare(optimizer)
    model = net if sharded else accelerator.prepare(net)  # DDP
    parameters = [p for p in net.parameters() if p.requires_grad]
    products = average.module if average else net  # what is evaluated and saved as the result
    parts = Parts(net, average, optimizer, schedule, accelerator.scaler)
    names = Names.of(val_set)
    state = restore(folder, parts, say) if resume else State()
    if resume:
        damaged.load(folder / "unreadable.txt")

    offsets = loader.share(images, world, rank, config.optim.micro_batch)
    order = loader.Order(len(train_set), config.run.seed, config.data.repeats)
    positions = loader.Steps(order, state.step, steps, images, offsets)
    accelerator.wait_for_everyone()  # a process that checks late must not find the folder that another one makes
    if accelerator.is_main_process:
        open_folder(folder, config, resume)  # after what can fail: a wrong path or argument leaves nothing behind
    if config.run.trackers:
        flat = {
            f"{name}.{key}": str(value) for name, part in configuration.as_dict(config).items() for key, value in part.items()
        }
        accelerator.init_trackers("backbone-zoo", flat)
    batches = loader.training_batches(train_set, positions, config.data.workers, accelerator.device.type == "cuda")
    log = Log(
        folder,
        state.step,
        steps,
        config.run.log_every,
        images,
        pass_steps,
        main,
        lambda x: accelerator.reduce(x, "sum"),
        accelerator.log if config.run.trackers else None,
        scaled=config.run.precision == "fp16",
    )
    log.say(
        f"{config.model.backbone}: {sum(p.numel() for p in parameters):,} parameters train (of "
        f"{sum(p.numel() for p in net.parameters()):,}) on {len(train_set)} samples, {len(val_set)} to evaluate; "
        f"{accelerator.device}, precision {config.run.precision}"
    )
    log.say(
        f"total batch {images} = {world} process{'es' if world > 1 else ''} x {len(offsets)} micro-batch"
        f"{'es' if len(offsets) > 1 else ''} of {max(map(len, offsets))}; {steps} steps = {steps / pass_steps:.1f} passes; "
        f"learning rate {config.optim.lr:g}; evaluation every {eval_every} steps, checkpoint every {save_every}; {folder}"
    )
    began, metrics = time.perf_counter(), {}
    train_mode(model)
    with contextlib.closing(log), stop_signal() as stop, readable(config, folder):
        for step in range(state.step, steps):
            loader.seed_all(config.run.seed, step, rank)
            schedule.step_update(step)
            micro, waited = take(batches, len(offsets), config, accelerator.device)
            counts = torch.stack([task.weight(batch) for batch in micro])
            shares = counts / accelerator.reduce(counts.sum(0), "sum").clamp_min(1e-12)
            losses = []
            for i, (batch, share) in enumerate(zip(micro, shares, strict=True)):
                with accelerator.no_sync(model) if i + 1 < len(micro) else contextlib.nullcontext():
                    with accelerator.autocast():
                        loss = (task.loss(model, batch) * share).sum()
                    accelerator.backward(loss * world)  # gradients are averaged over processes; the loss is a sum
                losses.append(loss.detach())
            if config.optim.clip_norm:
                grad_norm = accelerator.clip_grad_norm_(parameters, config.optim.clip_norm)  # before clipping
            else:
                accelerator.unscale_gradients()
                grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            grad_norm = sharding.whole(grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update(net, step + 1)
            state.step = step + 1
            files = [(loss, batch["path"]) for loss, batch in zip(losses, micro, strict=True)]
            log.step(state.step, sum(losses), grad_norm, max(group["lr"] for group in optimizer.param_groups), files, waited)

            last = state.step == steps
            damaged.note("train", micro)
            if last or state.step % config.run.log_every == 0:
                damaged.agree(accelerator, log)
            stopped = stop.agreed(accelerator, last or state.step % config.run.log_every == 0)
            if state.step % eval_every == 0 or last:
                log.flush()
                same_buffers(net, products)
                clock = time.perf_counter()
                metrics = evaluate(task, products, val_set, accelerator, config, damaged)
                damaged.agree(accelerator, log)
                better = improved(state, metrics, task.best)
                log.evaluation(state.step, metrics, time.perf_counter() - clock, "  best so far" if better else "")
                if better:
                    save_product(folder / "model.safetensors", products, config, state.step, metrics, names, main)
                train_mode(model)
            if state.step % save_every == 0 or last or stopped:
                log.flush()
                save(folder, parts, state, main)
            if stopped and not last:
                log.say(f"stopped by a signal after step {state.step}; the run is saved and goes on with --resume")
                break

        if not metrics and state.step == steps:  # resumed after its last step
            metrics = evaluate(task, products, val_set, accelerator, config)
        summary = {"step": state.step, "steps": steps, "best": {}, "best_step": state.best_step, "last": metrics}
        summary |= {"stopped": state.step < steps, "seconds": round(time.perf_counter() - began, 1)}
        summary |= {"unreadable": damaged.counts()} if damaged.share else {}
        if state.step == steps:
            finish(folder, config, task, products, val_set, accelerator, summary, log)
        accelerator.wait_for_everyone()
    if config.run.trackers:
        accelerator.end_training()
    return summary


# --------------------------------------------------------------------------------------------------------------- setting up


def start(config: Config) -> Accelerator:
    """The Accelerator of this process. Raises ValueError for a device or precision this machine does not have."""
    run = config.run
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda but torch sees no GPU; leave it null or set cpu")
    if run.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("run.device is mps but torch sees no such device; leave it null or set cpu")
    cpu = run.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if run.precision == "fp16" and cpu:
        raise ValueError("run.precision fp16 needs a GPU; use bf16 or no on the CPU")
    ready = [tracker.value for tracker in get_available_trackers()]
    for name in run.trackers:
        if name not in ready:  # Accelerate would leave it out without a word
            raise ValueError(f"run.trackers: {name!r} is not installed, or unknown to Accelerate; there are {', '.join(ready)}")
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may run twice, with another precision or device
    accelerator = Accelerator(
        mixed_precision=run.precision,
        cpu=cpu,
        log_with=run.trackers or None,
        project_dir=run.dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    return accelerator


def in_use(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def check_folder(folder: Path, config: Config, resume: bool, accept_changes: bool) -> None:
    """Raises FileExistsError for a folder in use, ValueError with the differences if a resumed run's config has changed."""
    saved, used = folder / "config.yaml", in_use(folder)
    if used and resume:
        if not saved.is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")
        old, new = yaml.safe_load(saved.read_text()), configuration.as_dict(config)
        old["run"].pop("overwrite", None), new["run"].pop("overwrite", None)
        changes = configuration.difference(old, new)
        if changes and not accept_changes:
            raise ValueError(
                f"the config has changed since {folder} was started:\n  " + "\n  ".join(changes) + "\n"
                "add --accept-changes to go on with the new one, or choose another run.dir"
            )
    elif used and not config.run.overwrite:
        raise FileExistsError(
            f"{folder} exists; choose another --run.dir, go on with --resume, or replace it with --run.overwrite=true"
        )
    elif used and not saved.is_file():
        raise FileExistsError(f"{folder} holds no run (no config.yaml) and is not overwritten; choose another run.dir")


def open_folder(folder: Path, config: Config, resume: bool) -> None:
    """Makes the run folder, without the files of the run that it replaces, and writes its config.yaml."""
    if in_use(folder) and not resume:
        for name in (*RUN_FILES, "unreadable.txt"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / "config.yaml", lambda temporary: temporary.write_text(configuration.as_yaml(config)))


def dataset(config: Config, task: Task, split: str) -> Dataset:
    """A split with its transform: seeded by the draw for training. Raises ValueError if it does not fit the task."""
    data = config.data
    train = split == "train"
    plain = open_split(data, split, task.targets)
    task.check(plain)
    if not len(plain):
        raise ValueError(f"{data.name} has no {split} samples")
    size, mean, std = tuple(data.size), tuple(data.mean), tuple(data.std)
    transform = build_transform(
        train, task.targets, size, mean, std, config.augment, plain.ignore_index, config.data.eval_resize
    )
    if train:
        return Seeded(plain, transform, config.run.seed)
    plain.transform = transform
    return plain


def build(config: Config, task: Task, say: Any = print, own: Path | None = None) -> nn.Module:
    """The task's model as the config wants it: weights, edits, memory format, checkpointing of activations, frozen parts.

    Released weights come first, then model.checkpoint, then model.edits, which find the weights of the plain model there; then
    `own`, a file of this run, which holds the edited model.
    """
    net = task.build(config.model)
    if config.model.checkpoint is not None:
        say(load_weights(net, config.model.checkpoint))
    net = edit_backbone(net, config.model.edits)
    if own is not None:
        say(load_weights(net, str(own)))
    if config.model.freeze_backbone:
        optim.freeze_backbone(net)
    if config.run.grad_checkpointing:
        if not hasattr(net, "set_grad_checkpointing"):
            raise ValueError(f"{type(net).__name__} has no activation checkpointing; set run.grad_checkpointing=false")
        net.set_grad_checkpointing(True)
    return net.to(memory_format=torch.channels_last) if config.run.channels_last else net


def edit_backbone(net: nn.Module, edits: Sequence[dict[str, Any]]) -> nn.Module:
    """The model with the edits applied to its backbone; they find it under a head, or as the whole of a classifier."""
    if not hasattr(net, "backbone"):
        return backbones.edits.apply(net, edits)
    net.backbone.model = backbones.edits.apply(net.backbone.model, edits)
    return net


def load_weights(net: nn.Module, source: str) -> Any:
    """Loads a file, or the result of a run folder, into the whole model if it is one of ours, else into its backbone.

    Returns the report of weights.load_checkpoint. Raises FileNotFoundError, or ValueError for weights that do not fit.
    """
    path = Path(source)
    return weights.load_checkpoint(net, path / "model.safetensors" if path.is_dir() else path, strict=False)


# ------------------------------------------------------------------------------------------------------------ inside the loop


def take(batches: Iterator[dict], count: int, config: Config, device: torch.device) -> tuple[list[dict[str, Any]], float]:
    """The step's micro-batches on the device, and the seconds spent waiting for them."""
    clock = time.perf_counter()
    micro = [next(batches) for _ in range(count)]
    waited = time.perf_counter() - clock
    return [on_device(batch, config, device) for batch in micro], waited


def on_device(batch: dict[str, Any], config: Config, device: torch.device) -> dict[str, Any]:
    batch = send_to_device(batch, device, non_blocking=True)
    if config.run.channels_last:
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
    return batch


def train_mode(model: nn.Module) -> None:
    """Training mode, except for modules whose parameters are all frozen: their norms and dropout stay as in evaluation."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def same_buffers(*modules: nn.Module) -> None:
    """Buffers (batch norm statistics) of the main process on all of them: each has seen its own images only."""
    for module in modules:
        for buffer in module.buffers():
            broadcast(buffer)


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, data: Dataset, accelerator: Accelerator, config: Config, damaged: Damaged | None = None
) -> dict[str, float]:
    """The task's metrics over a dataset, each sample counted once whatever the number of processes. Leaves the model in eval
    mode. damaged: is told which files were left out.
    """
    model.eval()
    metric = task.metric()
    if accelerator.device.type == "cuda":
        metric.to(accelerator.device)
    run = inference(task, model, config)
    batches = loader.evaluation_batches(
        data,
        config.data.eval_batch,
        accelerator.num_processes,
        accelerator.process_index,
        config.data.workers,
        accelerator.device.type == "cuda",
    )
    for counts, batch in batches:
        if damaged is not None:
            damaged.note("val", [batch])
        batch = on_device(batch, config, accelerator.device)
        with accelerator.autocast():
            output = run(batch["image"])
        if counts:
            task.measure(metric, output, batch)
    metric.sums = {name: accelerator.reduce(value, "sum") for name, value in metric.sums.items()}
    return metric.compute()


def open_run(
    folder: str | Path, overrides: Sequence[str] = (), weights: str = "model.safetensors"
) -> tuple[Config, Task, nn.Module, Names]:
    """(config, task, model with its weights, class names) of a finished run.

    Raises FileNotFoundError if the folder is no run, or has no such weights yet.
    """
    folder, config = Path(folder), configuration.load_run(folder, overrides)
    if not (folder / weights).is_file():
        raise FileNotFoundError(f"{folder} has no {weights}: the run has not been evaluated yet")
    config.model.pretrained, config.model.checkpoint = False, None  # the run's own file holds everything
    task = configuration.build_task(config)
    model = build(config, task, say=lambda text: None, own=folder / weights)
    with safe_open(folder / weights, "pt") as file:
        names = Names(**json.loads((file.metadata() or {}).get("names", "{}")))
    return config, task, model.eval(), names


def inference(task: Task, model: nn.Module, config: Config) -> Any:
    """What maps images to model outputs at evaluation: the model, or windows, scales and flips of it averaged."""
    if config.infer == InferConfig():
        return model
    return Predictor(model, average=task.average, **dataclasses.asdict(config.infer))


def protocol(task: Task, config: Config) -> str:
    """How a metric was made, in words: targets and alignment; for dense tasks also sizes, windows, scales and flips."""
    parts = [task.metric().protocol]
    if task.average is not None:
        run = Predictor(nn.Identity(), average=task.average, **dataclasses.asdict(config.infer))
        parts += [describe_evaluation(tuple(config.data.size), config.data.eval_resize), run.protocol]
    return "; ".join(parts)


def evaluate_run(folder: str | Path, overrides: Sequence[str] = (), weights: str = "model.safetensors") -> dict[str, Any]:
    """Metrics of a finished run's weights on its validation split, or on what the overrides say, and their "protocol"."""
    config = configuration.load_run(folder, overrides)
    accelerator = start(config)
    config, task, model, _ = open_run(folder, overrides, weights)
    data = dataset(config, task, "val")
    damaged = Damaged(config.data.skip_unreadable, {"val": data})
    metrics = evaluate(task, model.to(accelerator.device), data, accelerator, config, damaged)
    damaged.agree(accelerator)
    skipped = {"unreadable": damaged.counts()["val"]} if damaged.share else {}
    return {**metrics, "samples": len(data), **skipped, "protocol": protocol(task, config)}


def improved(state: State, metrics: dict[str, float], best: tuple[str, str]) -> bool:
    """Whether these are the best metrics so far; notes them in the state."""
    value = metrics[best[0]]
    sign = 1 if best[1] == "max" else -1
    if state.best is not None and not sign * value > sign * state.best:
        return False
    state.best, state.best_step = value, state.step
    return True


class Stop:
    """Set by SIGTERM and SIGINT. A second SIGINT acts as usual; a second SIGTERM changes nothing, because a cluster sends it to
    the launcher and to its processes, and the launcher passes it on.
    """

    def __init__(self) -> None:
        self.asked = False

    def agreed(self, accelerator: Accelerator, now: bool) -> bool:
        """Whether to stop, the same on every process. Several processes ask each other only at `now`, which spares a wait."""
        if accelerator.num_processes == 1:
            return self.asked
        if not now:
            return False
        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device), "sum") > 0)


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Catches the signals that ask a run to end. Outside the main thread, where Python allows no handlers, they act as
    usual.
    """
    stop, before = Stop(), {}

    def ask(number: int, frame: Any) -> None:
        stop.asked = True
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def readable(config: Config, folder: Path) -> Iterator[None]:
    """Turns what machines run out of into RunError."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)  # GPU, CPU
        if full:
            raise RunError(
                "out of memory with micro-batches of up to "
                f"{config.optim.micro_batch or config.optim.global_batch} images: lower optim.micro_batch (the total batch "
                "stays), or data.eval_batch if it was evaluating, or set run.grad_checkpointing=true or run.precision=bf16"
            ) from error
        if disk_full(error):
            raise RunError(
                f"no space left on the disk of {folder}: free some, and go on with --resume from the last checkpoint"
            ) from error
        if isinstance(error, torch.distributed.DistError) or re.search("gloo.*(reset|closed) by peer", str(error)):
            raise RunError(
                "another process of this run has ended, and what it printed says why; go on with --resume, or let torchrun "
                "restart the run by itself: --max-restarts 3 before -m, and --resume"
            ) from error
        if isinstance(error, RuntimeError) and re.search("DataLoader worker.*(exited unexpectedly|is killed)", str(error)):
            raise RunError(
                f"a data loading worker was killed, usually for memory: lower data.workers (now {config.data.workers}), "
                "and go on with --resume"
            ) from error
        raise


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a file could not grow: by its number, or in safetensors' or torch's
    words, which carry none.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if re.search(r"No space left|quota exceeded|File too large|PytorchStreamWriter failed|unexpected pos \d", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


# --------------------------------------------------------------------------------------------------------- saving and restoring


@dataclass
class Parts:
    """Everything with a state that a run carries from step to step."""

    net: nn.Module
    average: Any
    optimizer: Any
    schedule: Any
    scaler: Any


def save(folder: Path, parts: Parts, state: State, main: bool) -> None:
    """One checkpoint, written by the main process; all of them gather what is split. Random numbers and the place in the data
    need no state: they are functions of seed and step.
    """
    tensors = {"model": sharding.whole(parts.net.state_dict())}
    if parts.average:
        tensors["averaged"] = sharding.whole(parts.average.module.state_dict())
    rest = {
        "progress": dataclasses.asdict(state),
        "optimizer": sharding.whole(parts.optimizer.state_dict()),
        "schedule": {key: value for key, value in parts.schedule.state_dict().items() if plain_value(value)},
        "scaler": parts.scaler.state_dict() if parts.scaler else {},
    }
    if main:
        checkpoint.save(folder / "checkpoints", state.step, tensors, rest)


def plain_value(value: Any) -> bool:
    """Whether a value is made of what torch.load(weights_only=True) reads."""
    if isinstance(value, (list, tuple)):
        return all(plain_value(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def restore(folder: Path, parts: Parts, say: Any) -> State:
    """Loads the newest intact checkpoint into the parts; a fresh State if there is none yet."""
    path = checkpoint.latest(folder / "checkpoints", say)
    if path is None:
        say(f"no checkpoint in {folder} yet: starting at step 0")
        return State()
    tensors, rest = checkpoint.load(path)
    sharding.load_model(parts.net, tensors["model"])
    if parts.average:
        sharding.load_model(parts.average.module, tensors.get("averaged", tensors["model"]))
    sharding.load_optimizer(parts.optimizer, rest["optimizer"])
    parts.schedule.load_state_dict(rest["schedule"])
    if parts.scaler and rest["scaler"]:
        parts.scaler.load_state_dict(rest["scaler"])
    state = State(**rest["progress"])
    say(f"going on from step {state.step} ({path.name})")
    return state


def save_product(
    path: Path, model: nn.Module, config: Config, step: int, metrics: dict[str, float], names: Names, main: bool
) -> None:
    """Weights as a result: safetensors with config, metrics and class names in its header, written by the main process."""
    about = {"metrics": metrics, "config": configuration.as_dict(config), "names": dataclasses.asdict(names)}
    about = {"step": str(step), **{key: json.dumps(value) for key, value in about.items()}}
    tensors = sharding.whole(model.state_dict())
    if main:
        checkpoint.save_weights(path, tensors, about)


def finish(
    folder: Path, config: Config, task: Task, model: nn.Module, data: Dataset, accelerator: Accelerator, summary: dict, log: Log
) -> None:
    """Last weights, summary, curves, pictures of the best weights, and the table, from the main process.

    Every process calls it, because a model may be split over them.
    """
    main, names = accelerator.is_main_process, Names.of(data)
    save_product(folder / "last.safetensors", model, config, summary["step"], summary["last"], names, main)
    accelerator.wait_for_everyone()  # the best weights may have been written a moment ago
    sharding.load_model(model, load_file(folder / "model.safetensors"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        summary["best"] = json.loads(file.metadata()["metrics"])
    if main:
        checkpoint.write(folder / "summary.json", lambda temporary: temporary.write_text(json.dumps(summary, indent=1)))
        curves(folder)
    pictures(folder / "predictions.png", task, model, data, accelerator, config)
    rows = [
        (f"{name} (best, step {summary['best_step']} / last)", f"{value:.4f} / {summary['last'].get(name, math.nan):.4f}")
        for name, value in summary["best"].items()
    ]
    rows += [("protocol", protocol(task, config)), ("time", f"{summary['seconds']:.0f} s"), ("folder", str(folder))]
    log.table(config.model.backbone, rows)


@torch.no_grad()
def pictures(path: Path, task: Task, model: nn.Module, data: Dataset, accelerator: Accelerator, config: Config) -> None:
    """Image, truth and prediction of a few evenly spaced samples side by side; every process runs the model, one writes."""
    model.eval()
    names = Names.of(data)
    chosen = [i * len(data) // 6 for i in range(min(6, len(data)))]
    rows = []
    for i in chosen:
        batch = on_device(loader.collate([data[i]]), config, accelerator.device)
        with accelerator.autocast():
            output = inference(task, model, config)(batch["image"])
        prediction = task.measure(task.metric(), output, batch)
        image = visualize.to_rgb(batch["image"][0], config.data.mean, config.data.std)
        rows.append(task.picture(image, batch, prediction, names))
    if accelerator.is_main_process:
        visualize.save_predictions(path, rows, **task.legend(names))
