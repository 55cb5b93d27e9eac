"""``python -m lightning_autolr`` is ``lightning-autolr``."""

import sys

from lightning_autolr.report.jobs import end_with_parent

end_with_parent()  # before the long imports, during which a parent may end, too

from lightning_autolr.cli import main  # noqa: E402

sys.exit(main())
