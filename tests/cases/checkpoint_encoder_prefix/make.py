"""python make.py FILE.pth: every name behind "encoder."."""

import sys

import timm
import torch

import backbones  # noqa: F401

torch.manual_seed(0)
state = timm.create_model("nat_mini", embed_dim=32, depths=(1, 1, 1, 1)).state_dict()
torch.save({"model": {"encoder." + k: v for k, v in state.items()}}, sys.argv[1])
