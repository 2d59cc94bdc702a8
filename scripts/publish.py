"""Check a model, a Space or a metric, and push it to the Hub in one commit.

    scripts/run python scripts/publish.py runs/train_slots me/slots --dry_run     # check and list the files
    scripts/run python scripts/publish.py runs/train_slots me/slots --tag v1.0
    scripts/run python scripts/publish.py spaces/slot_explorer me/slot-explorer --type space --model runs/train_slots
    scripts/run python scripts/publish.py segmentation me/segmentation --type metric

Pushing needs a token with write access: run `hf auth login`, or set HF_TOKEN. Checkpoints and logs are not pushed.
"""

import sys

from hf_dl.publishing.command import main

if __name__ == "__main__":
    sys.exit(main())
