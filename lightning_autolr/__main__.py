"""``python -m lightning_autolr`` is ``lightning-autolr``."""

import sys

from lightning_autolr.cli import main

sys.exit(main())
