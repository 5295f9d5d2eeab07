"""python make.py FILE.pth: weights under a key of another program."""

import sys

import timm
import torch

import backbones  # noqa: F401

torch.manual_seed(0)
state = timm.create_model("nat_mini", embed_dim=32, depths=(1, 1, 1, 1)).state_dict()
torch.save({"epoch": 1, "model_state_dict": state, "optimizer_state_dict": {}}, sys.argv[1])
