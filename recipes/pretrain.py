"""Pretrain a ResNeXt on hashtagged images.

python recipes/pretrain.py                                                       one rank
torchrun --nproc-per-node 2 recipes/pretrain.py --recipe recipes/pretrain/emoji.yaml
deepspeed --num_accelerators 2 recipes/pretrain.py --ds_config zero2.json batch.micro=16
python recipes/pretrain.py --help                                                every key with its default
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    from scale_wsl.training.pretrain import main

    sys.exit(main(sys.argv[1:], default_recipe=Path(__file__).parent / "pretrain" / "emoji.yaml"))
