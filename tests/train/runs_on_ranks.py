"""Several training runs in one launch, since starting processes takes longer than the runs. `test_two_ranks.py` reads.

    python runs_on_ranks.py SPEC    SPEC: JSON list of [arguments of a run, its output folder]

Each rank also writes OUTPUT/images-RANK.json, how many images each of its micro-batches had.
"""

import json
import os
import sys
from pathlib import Path

from cal_train.cli.main import main
from cal_train.train.trainer import VlmTrainer


def record_images(counts):
    plain = VlmTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        pixels = inputs.get("pixel_values")
        counts.append(0 if pixels is None else len(pixels))
        return plain(self, model, inputs, *args, **kwargs)

    VlmTrainer.compute_loss = compute_loss


if __name__ == "__main__":
    counts = []
    record_images(counts)
    for arguments, output in json.loads(Path(sys.argv[1]).read_text()):
        counts.clear()
        code = main([*arguments, "--output_dir", output])
        if code:
            sys.exit(code)
        (Path(output) / f"images-{os.environ['RANK']}.json").write_text(json.dumps(counts))
