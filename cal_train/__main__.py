"""``python -m cal_train VERB ...`` and ``accelerate launch -m cal_train VERB ...``."""

import sys

from cal_train.cli.main import main

sys.exit(main())
