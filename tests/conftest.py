import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import subprocess
import sys

import pytest
import torch

FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2], weights_only=True)).logits, sys.argv[3])
assert "peft" not in sys.modules and "cal_train" not in sys.modules
"""


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def fresh_logits(tmp_path):
    """Logits of a folder's model in a process that knows plain transformers only: ``fresh_logits(folder, batch)``."""

    def compute(folder, batch):
        torch.save(batch, tmp_path / "batch.pt")
        files = [str(tmp_path / name) for name in ("batch.pt", "logits.pt")]
        subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(folder), *files], check=True, cwd=tmp_path)
        return torch.load(tmp_path / "logits.pt", weights_only=True)

    return compute
