"""The keys of a configuration file, their types, defaults and meaning. Defaults live here and nowhere else."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

# How dense evaluation sizes an image: None: to the network's size, "native": not at all, (short, long): the ratio is kept, and
# it ends where its short side is `short` or its long side `long` (mmsegmentation's scale=(long, short), keep_ratio=True).
EvalResize = tuple[int, int] | Literal["native"] | None


@dataclass
class ModelConfig:
    """The model: backbone, head, and the weights they start from.

    Attributes:
        backbone: any timm model name; ours are listed by `zoo list`.
        pretrained: load the backbone's released weights.
        checkpoint: file or run folder whose weights are loaded after building (whole model if it fits, else the backbone).
        checkpoint_which: which of several weights in that file, by a part of their place (student, model_ema, ...); null = an
            average of the weights, or a teacher, before raw weights.
        edits: changes to the backbone once it has these weights, in order: a name of backbones.edits.EDITS and its arguments,
            e.g. [{name: test_time_registers, neurons: {9: [12]}}].
        backbone_args: arguments of the backbone, e.g. {drop_path_rate: 0.2}.
        head: a name of heads.HEADS, for dense tasks; classification uses the backbone's own classifier.
        head_args: arguments of the head class.
        aux_head: a second head trained beside the first, or null.
        aux_args: arguments of the second head.
        neck: what makes a pyramid of the maps of a plain ViT, for heads that read one: "pyramid" (ViTDet's), "multilevel"
            (mmsegmentation's MultiLevelNeck), or null for the maps as they are.
        out_indices: feature levels the head sees; null = all.
        freeze_backbone: train the head only; the backbone stays in evaluation mode.
        in_chans: image channels: 1 = grey, 3 = RGB, else as many as the files have (RGBA, four-band TIFF, .npy).
        img_size: height and width for backbones built for one size; null = data.size.
    """

    backbone: str = "nat_mini"
    pretrained: bool = False
    checkpoint: str | None = None
    checkpoint_which: str | None = None
    edits: list[dict[str, Any]] = field(default_factory=list)
    backbone_args: dict[str, Any] = field(default_factory=dict)
    head: str = "linear"
    head_args: dict[str, Any] = field(default_factory=dict)
    aux_head: str | None = None
    aux_args: dict[str, Any] = field(default_factory=dict)
    neck: Literal["pyramid", "multilevel"] | None = "pyramid"
    out_indices: list[int] | None = None
    freeze_backbone: bool = False
    in_chans: int = 3
    img_size: tuple[int, int] | None = None


@dataclass
class DataConfig:
    """The data set, and how its samples are read.

    Attributes:
        name: a name of train.data.DATASETS.
        root: folder of the dataset; null for generated and embedded ones.
        size: height and width of the network's input.
        eval_resize: images of evaluation and prediction, dense tasks: null = resized to size; native = as they are;
            [short side, largest long side] = resized, ratio kept (ADE20K: usually [512, 2048]), which needs eval_batch 1.
        workers: loader processes per training process.
        eval_batch: images per process and evaluation step.
        repeats: times each image is drawn in a row, augmented differently; a pass then shows 1/repeats of the images.
        skip_unreadable: share of a split's files that may be damaged and are skipped and counted; 0 = the first is an error.
        image_range: [black, white], the values of image files that become 0 and 255, for files that are not 8 bit (12-bit
            cameras: [0, 4095], floats: [0, 1]); values outside are cut, and 256 levels remain. null = such files are refused,
            but for 16-bit ones that use the whole range.
        max_pixels: largest height x width of a file; a small file can unpack to fill the memory.
        val_is_train: allow training and validation on the same images, to see whether a model can learn them by heart.
        args: arguments of the dataset class.
        mean: of the input normalisation; null = the backbone's own.
        std: of the input normalisation; null = the backbone's own.
    """

    name: str = "scenes"
    root: str | None = None
    size: tuple[int, int] = (96, 128)
    eval_resize: EvalResize = None
    workers: int = 0
    eval_batch: int = 16
    repeats: int = 1
    skip_unreadable: float = 0.0
    image_range: tuple[float, float] | None = None
    max_pixels: int = 178_956_970
    val_is_train: bool = False
    args: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass
class AugmentConfig:
    """What changes a training image. Geometry moves image, mask and depth together; evaluation images are only resized.

    Attributes:
        crop: how the training size is reached. "resize": the whole image; "area": a random box of `scale` of the image's area
            and `ratio` width:height, resized (classification); "scale": the image made to cover the size, times a factor drawn
            from `scale`, then a random crop, padded where it is smaller (dense prediction); "native": the same from the image's
            own size; "pad": the whole image resized, padded by `pad` pixels on every side, random crop.
        scale: range of "area" (share of the area) or of "scale" and "native" (factor).
        ratio: range of width:height of "area".
        pad: pixels of "pad".
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        rotate: largest rotation in degrees, both ways.
        zoom_depth: divide depth by the factor of "scale" or "native", as if the camera had moved instead of zoomed.
        color_jitter: strength of random brightness, contrast and saturation, and a tenth of it of hue; 0 = off.
        color_jitter_prob: probability of the jitter.
        auto_augment: timm's policy text, e.g. rand-m9-mstd0.5-inc1; classification only.
        cut_depth: probability that a strip of the image, of full height and random width, is replaced by the depth there
            (CutDepth, Ishii and Yamashita 2021, as in GLPN).
        cut_depth_form: what the strip holds. "metres": metres, put into the finished image; "file_units": the numbers of the
            file modulo 256 as grey levels, put into the image before flip, crop and colour, as GLPN's code does.
        random_erasing: probability that a box of noise is erased from the image; classification only.
        eval_crop: share of the image a centre crop keeps at evaluation; classification only.
        interpolation: of images.
    """

    crop: Literal["resize", "area", "scale", "native", "pad"] = "resize"
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    pad: int = 4
    hflip: float = 0.0
    vflip: float = 0.0
    rotate: float = 0.0
    zoom_depth: bool = False
    color_jitter: float = 0.0
    color_jitter_prob: float = 0.5
    auto_augment: str | None = None
    cut_depth: float = 0.0
    cut_depth_form: Literal["metres", "file_units"] = "metres"
    random_erasing: float = 0.0
    eval_crop: float = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


@dataclass
class OptimConfig:
    """Optimiser, schedule and averaging.

    Attributes:
        name: any optimiser of timm (timm.optim.list_optimizers()).
        lr: learning rate for the total batch; it is never rescaled silently.
        weight_decay: not applied to biases, norms and what the model excludes.
        betas: of Adam-like optimisers; null = the optimiser's own.
        momentum: of SGD-like optimisers.
        eps: null = the optimiser's own.
        schedule: learning rate after the warm-up, per step. rise_fall: from min_lr up to lr at the first of decay_at, and down
            again (GLPN).
        power: of "poly" and "rise_fall".
        decay_at: shares of the run at which "step" multiplies the rate by decay_rate.
        decay_rate: of "step".
        min_lr: the schedule ends here.
        warmup_steps: steps of linear warm-up, or null for warmup_epochs.
        warmup_epochs: passes of linear warm-up.
        warmup_lr: the warm-up starts here.
        warmup_first: the schedule's curve starts after the warm-up (mmsegmentation 1.x) instead of at step 0 (timm).
        steps: optimiser steps of the run; give this or epochs.
        epochs: passes over the training set.
        global_batch: images per optimiser step over all processes.
        micro_batch: most images one process puts through the model at once; null = its whole share.
        clip_norm: largest gradient norm; null = no clipping.
        layer_decay: factor per layer from the head down; null = off.
        head_lr_scale: factor on the learning rate of everything that is not backbone.
        lr_scales: part of a parameter's name -> factor on its learning rate, e.g. {offset.weight: 0.01}.
        ema_decay: of the averaged weights that are evaluated and saved as best; null = off.
        ema_warmup: let the decay grow from 0 in the first steps.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    momentum: float = 0.9
    eps: float | None = None
    schedule: Literal["constant", "cosine", "poly", "linear", "step", "rise_fall"] = "cosine"
    power: float = 1.0
    decay_at: list[float] = field(default_factory=lambda: [0.5, 0.75])
    decay_rate: float = 0.1
    min_lr: float = 0.0
    warmup_steps: int | None = None
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    warmup_first: bool = False
    steps: int | None = None
    epochs: float | None = None
    global_batch: int = 32
    micro_batch: int | None = None
    clip_norm: float | None = None
    layer_decay: float | None = None
    head_lr_scale: float = 1.0
    lr_scales: dict[str, float] = field(default_factory=dict)
    ema_decay: float | None = None
    ema_warmup: bool = True


@dataclass
class RunConfig:
    """Run folder, device, precision and intervals.

    Attributes:
        dir: run folder; null = runs/<config name>.
        overwrite: replace an existing run folder.
        seed: of weights, sample order, augmentation and dropout.
        precision: no = float32; bf16 and fp16 are autocast.
        parallel: what several processes share: ddp = each has the whole model; fsdp = each a slice of it (torch's FSDP2).
        compile: torch.compile the model.
        channels_last: memory format of images and convolutions.
        grad_checkpointing: recompute activations in the backward pass.
        sync_batchnorm: batch norm over the micro-batches of all processes, as one process would see them.
        device: cpu, cuda or mps; null = the fastest there is.
        threads: CPU threads per process; null = torch's choice.
        eval_every: steps between evaluations; null = ten times in the run.
        save_every: steps between checkpoints; null = at every evaluation.
        log_every: steps between log rows.
        trackers: further trackers of Accelerate, e.g. [wandb].
    """

    dir: str | None = None
    overwrite: bool = False
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    sync_batchnorm: bool = True
    device: Literal["cpu", "cuda", "mps"] | None = None
    threads: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    trackers: list[str] = field(default_factory=list)


@dataclass
class InferConfig:
    """How evaluation and prediction run the model over an image (dense tasks).

    Attributes:
        mode: the whole image at once, or overlapping windows.
        window: height and width of "slide".
        stride: between windows; null = two thirds of the window.
        blend: what overlapping windows weigh, all the same or less towards their borders.
        scales: of the image, predictions averaged.
        flip: average with the mirrored image.
    """

    mode: Literal["whole", "slide"] = "whole"
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    blend: Literal["mean", "smooth"] = "mean"
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = False


@dataclass
class Config:
    """One run. `task` holds its name and the arguments of the class TASKS[name]."""

    task: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in fields(Config) if f.name != "task"}
