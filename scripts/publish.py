"""Check a model, a Space or a metric, and push it to the Hub in one commit; or render a dataset and push its shards.

    scripts/run python scripts/publish.py runs/train_slots me/slots --dry_run     # check and list the files
    scripts/run python scripts/publish.py runs/train_slots me/slots --tag v1.0
    scripts/run python scripts/publish.py spaces/slot_explorer me/slot-explorer --type space --model runs/train_slots
    scripts/run python scripts/publish.py segmentation me/segmentation --type metric
    scripts/run python scripts/publish.py scenes me/scenes --type dataset --style textured --num_scenes 20000

Pushing needs a token with write access: run `hf auth login`, or set HF_TOKEN. Checkpoints and logs are not pushed. A
dataset is pushed shard by shard, and the same command continues an interrupted push.
"""

import sys

from hf_dl.publishing.command import main

if __name__ == "__main__":
    sys.exit(main())
