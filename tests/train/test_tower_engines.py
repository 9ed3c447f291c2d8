"""Towers on two gloo ranks under DeepSpeed's ZeRO: the same losses and weights as under DDP."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from cal_train.testing import write_tiny_pairs

pytestmark = pytest.mark.slow

RUNS_ON_RANKS = Path(__file__).parent / "runs_on_ranks.py"
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "model_type": "clip_text_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16,
}  # fmt: skip
OBJECTIVES = {
    "clip": {"init_scale": 99.9},  # pushed beyond its limit of 100
    "siglip": {"bias_init": "auto"},
    "sparc": {},
    "coca": {"num_queries": 4, "decoder_layers": 1, "num_heads": 4},
    "sycoca": {"num_queries": 4, "decoder_layers": 1, "num_heads": 4, "image_decoder_layers": 1},
    "llip": {"num_heads": 2},
    "filip": {},
}
ENGINES = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
CHUNK = ("--grad_cache_chunk", "1")
