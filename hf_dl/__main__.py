"""Run the `hf-dl` command with `python -m hf_dl`."""

import sys

from hf_dl.cli import main

sys.exit(main())
