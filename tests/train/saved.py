"""A run folder as a finished run leaves it, without training: configuration, and random weights with their names."""

import torch

from train import config, setup
from train.folder import open_folder
from train.results import save_product
from train.show import Names
from train.show.sheet import make_palette


def run(folder, values, classes=None):
    """The run folder `folder` of the configuration `values`, with class names."""
    made = config.resolve(values)
    made.run.dir = str(folder)
    torch.manual_seed(0)
    model = setup.build(made, config.build_task(made), say=lambda text: None)
    open_folder(folder, made, False)
    names = Names(classes, make_palette(len(classes))) if classes else Names()
    save_product(folder / "model.safetensors", model, made, 1, {}, names, True)
    return folder
