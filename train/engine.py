"""The training loop, on Hugging Face Accelerate; blind to the task.

The same text runs one process or many (torchrun, accelerate launch). A step is defined by the total batch: every process puts
its slice through the model in micro-batches, each loss weighted by its share of the step's valid targets, so the gradient is
that of the mean over the whole batch however it was cut. All that is random is a function of (seed, step, position in the total
batch), so a run that was killed goes on as if it had not been.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.scheduler.scheduler import Scheduler
from torch import nn

from backbones.ops import neighborhood
from train import config as configuration
from train import loader, optim, sharding, syncbn
from train.damaged import Damaged
from train.data import ImageDataset
from train.data.check import refuse
from train.evaluation import evaluate
from train.failures import Stop, readable, stop_signal
from train.folder import MEASURES, check_folder, claimed, open_folder, repair_rows, versions
from train.log import Log
from train.randomness import by_position, drawn_for, seed_all
from train.results import finish, save_product
from train.schema import Config
from train.setup import build, data_sets, start
from train.show import Names
from train.state import Parts, RunState, improved, restore, save, settings
from train.tasks import Task
from train.tasks.base import stacked


@dataclass
class Run:
    """Everything the loop works with, made by `prepare`.

    Attributes:
        accelerator: knows processes, devices and precision.
        batches: this process's micro-batches, from the first step that is left to the last.
        parts: the network, its average, optimiser, schedule and loss scale.
        model: the network as it is called in training, wrapped for several processes.
        products: the network or its average, whichever is evaluated and saved as the result.
        offsets: of this process's micro-batches inside the total batch.
        steps, eval_every, save_every: all counted in steps.
    """

    config: Config
    folder: Path
    accelerator: Accelerator
    task: Task
    val_set: ImageDataset
    batches: Iterator[dict[str, Any]]
    damaged: Damaged
    parts: Parts
    model: nn.Module
    products: nn.Module
    schedule: Scheduler
    names: Names
    state: RunState
    offsets: list[range]
    steps: int
    eval_every: int
    save_every: int
    log: Log


def fit(config: Config, resume: bool = False, accept_changes: bool = False) -> dict[str, Any]:
    """Trains, evaluates and saves the run that `config` describes; returns its summary.

    The summary has "best" and "last" metrics, "best_step", "step", "seconds" and "stopped", which is True after SIGTERM or a
    first SIGINT.

    Args:
        config: resolved, with a run folder.
        resume: go on from the newest intact checkpoint of the run folder, from the start if there is none.
        accept_changes: go on even if the config differs from the folder's.
    """
    accelerator = start(config)
    with claimed(Path(str(config.run.dir)), accelerator):
        run = prepare(config, accelerator, resume, accept_changes)
        began = time.perf_counter()
        with contextlib.closing(run.log), stop_signal() as stop, readable(config, run.folder):
            metrics = train(run, stop)
            if not metrics and run.state.step == run.steps:  # resumed after its last step
                metrics = evaluate(run.task, run.products, run.val_set, accelerator, config)
            summary = {"step": run.state.step, "steps": run.steps, "best": {}, "best_step": run.state.best_step}
            summary |= {"last": metrics, "stopped": run.state.step < run.steps}
            summary |= {"seconds": round(time.perf_counter() - began, 1), "versions": versions()}
            summary |= {"unreadable": run.damaged.counts()} if run.damaged.share else {}
            if run.state.step == run.steps:
                finish(run.folder, config, run.task, run.products, run.val_set, accelerator, summary, run.log)
            accelerator.wait_for_everyone()
    if config.run.trackers:
        accelerator.end_training()
    return summary


def train(run: Run, stop: Stop) -> dict[str, float]:
    """The steps that are left, with evaluations and checkpoints; returns the metrics of the last evaluation, if any."""
    config, accelerator, task, state, log = run.config, run.accelerator, run.task, run.state, run.log
    model, optimizer, average, schedule = run.model, run.parts.optimizer, run.parts.average, run.schedule
    parameters = [p for p in run.parts.net.parameters() if p.requires_grad]
    world, main = accelerator.num_processes, accelerator.is_main_process
    scheduled = [cast(Any, module) for module in run.parts.net.modules() if hasattr(module, "begin_step")]
    metrics: dict[str, float] = {}
    train_mode(model)
    for step in range(state.step, run.steps):
        schedule.step_update(step)
        for module in scheduled:  # what changes with the steps (a norm that becomes another) does so once a step
            module.begin_step(step, run.steps)
        micro, waited = loader.take(run.batches, len(run.offsets), accelerator.device, config.run.channels_last)
        micro = [augmented(batch, run, step) for batch in micro]
        found = [task.counts(batch) for batch in micro]
        terms = found[0]  # by name
        counts = torch.stack([stacked(each, terms) for each in found])
        shares = counts / accelerator.reduce(counts.sum(0), "sum").clamp_min(1e-12)
        losses = []
        for i, (batch, share, offsets) in enumerate(zip(micro, shares, run.offsets, strict=True)):
            seed_all(config.run.seed, step)  # the same for every micro-batch: what is drawn differs by position
            sync = accelerator.no_sync(model) if i + 1 < len(micro) else contextlib.nullcontext()
            with sync, drawn_for(offsets):
                with accelerator.autocast():
                    loss = stacked(task.losses(task.forward(model, batch), batch), terms) * share
                accelerator.backward(loss.sum() * world)  # gradients are averaged over processes; the loss is a sum
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
            average.update(run.parts.net, step + 1)
        state.step = step + 1
        files = [(loss, batch["path"]) for loss, batch in zip(losses, micro, strict=True)]
        log.step(state.step, terms, files, grad_norm, max(group["lr"] for group in optimizer.param_groups), waited)

        last = state.step == run.steps
        due = last or state.step % config.run.log_every == 0
        run.damaged.note("train", micro)
        if due:
            run.damaged.agree(accelerator, log)
        stopped = stop.agreed(accelerator, due)
        if state.step % run.eval_every == 0 or last:
            log.flush()
            same_buffers(run.parts.net, run.products)
            clock = time.perf_counter()
            metrics = evaluate(task, run.products, run.val_set, accelerator, config, run.damaged)
            run.damaged.agree(accelerator, log)
            better = improved(state, metrics, task.best)
            log.evaluation(state.step, metrics, time.perf_counter() - clock, "  best so far" if better else "")
            if better:
                save_product(run.folder / "model.safetensors", run.products, config, state.step, metrics, run.names, main)
            train_mode(model)
        if state.step % run.save_every == 0 or last or stopped:
            log.flush()
            save(run.folder, run.parts, state, main)
        if stopped and not last:
            log.say(f"stopped by a signal after step {state.step}; the run is saved and goes on with --resume")
            break
    return metrics


def prepare(config: Config, accelerator: Accelerator, resume: bool, accept_changes: bool) -> Run:
    """Data, model, optimiser and state of a run; its folder is filled last, when nothing else can fail.

    Raises FileExistsError for a folder in use, ValueError for what does not fit together.

    Args:
        config: resolved.
        accelerator: of this process.
        resume: go on from the newest intact checkpoint.
        accept_changes: although the configuration has changed.
    """
    say, folder = accelerator.print, Path(str(config.run.dir))
    world, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    changes = check_folder(folder, config, resume, accept_changes)
    seed_all(config.run.seed)
    task = configuration.build_task(config)
    train_set, val_set = data_sets(config, task)
    plain = cast(ImageDataset, train_set.dataset)
    damaged = Damaged(config.data.skip_unreadable, {"train": plain, "val": val_set})
    for sentence in refuse([plain, val_set], val_is_train=config.data.val_is_train):
        say(f"warning: {sentence}")
    net = build(config, task, say).to(accelerator.device)
    by_position(net)
    average = optim.averaged(net, config.optim)
    if config.run.sync_batchnorm and world > 1:
        syncbn.synchronise(net)
    sharded = config.run.parallel == "fsdp" and world > 1
    if sharded:
        sharding.shard(net, accelerator.device)
        if average:
            sharding.shard(average.module, accelerator.device)
            average.foreach = False  # split parameters and plain buffers do not mix in one call
    if config.run.compile:
        net.compile()
    optimizer = optim.optimizer(net, config.optim)
    images = config.optim.global_batch
    pass_steps = len(train_set) / images
    steps = config.optim.steps or math.ceil((config.optim.epochs or 0) * pass_steps)
    eval_every = config.run.eval_every or max(1, steps // 10)
    save_every = config.run.save_every or eval_every
    schedule = optim.schedule(optimizer, config.optim, steps, pass_steps)
    optimizer = accelerator.prepare(optimizer)
    model = net if sharded else accelerator.prepare(net)  # DDP
    parts = Parts(net, average, optimizer, accelerator.scaler, settings(optimizer))
    state = restore(folder, parts, say) if resume else RunState()
    if state.step > steps:
        raise ValueError(f"{folder} has made {state.step} steps already, more than the {steps} asked for: raise optim.steps")
    if state.best is not None and state.step < steps and any(change.startswith(MEASURES) for change in changes):
        say(f"the best so far, {state.best:.4f}, was measured in another way: the next evaluation counts as the best")
        state.best, state.best_step = None, 0
    if resume:
        damaged.load(folder / "unreadable.txt")

    offsets = loader.share(images, world, rank, config.optim.micro_batch, 2 * config.data.repeats if task.mixes else 1)
    order = loader.Order(len(train_set), config.run.seed, config.data.repeats)
    positions = loader.Steps(order, state.step, steps, images, offsets)
    accelerator.wait_for_everyone()  # a process that checks late must not find the folder that another one makes
    if main:
        if resume:
            due = {} if changes else {"log.csv": config.run.log_every, "metrics.csv": eval_every}
            repair_rows(folder, state.step, due, say)
        open_folder(folder, config, resume)  # after what can fail: a wrong path or argument leaves nothing behind
    if accelerator.device.type == "cpu":
        neighborhood.settle(net)
    if config.run.trackers:
        sections = configuration.as_dict(config).items()
        flat = {f"{name}.{key}": str(value) for name, part in sections for key, value in part.items()}
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
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    log.say(
        f"{config.model.backbone}: {trained:,} parameters train (of {sum(p.numel() for p in net.parameters()):,}) on "
        f"{len(train_set)} samples, {len(val_set)} to evaluate; {accelerator.device}, precision {config.run.precision}"
    )
    log.say(
        f"total batch {images} = {world} process{'es' if world > 1 else ''} x {len(offsets)} micro-batch"
        f"{'es' if len(offsets) > 1 else ''} of {max(map(len, offsets))}; {steps} steps = {steps / pass_steps:.1f} passes; "
        f"learning rate {config.optim.lr:g}; evaluation every {eval_every} steps, checkpoint every {save_every}; {folder}"
    )
    return Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        task=task,
        val_set=val_set,
        batches=batches,
        damaged=damaged,
        parts=parts,
        model=model,
        products=average.module if average else net,
        schedule=schedule,
        names=Names.of(val_set),
        state=state,
        offsets=offsets,
        steps=steps,
        eval_every=eval_every,
        save_every=save_every,
        log=log,
    )


def augmented(batch: dict[str, Any], run: Run, step: int) -> dict[str, Any]:
    """A micro-batch as the task augments it: draws are those of the step, pairs those of the total batch."""
    seed_all(run.config.run.seed, step)
    if run.task.mixes:
        partner = loader.partners(len(batch["image"]), run.config.data.repeats)
        batch = {**batch, "partner": partner.to(run.accelerator.device)}
    return run.task.augment(batch)


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
