# SPDX-License-Identifier: Apache-2.0
"""`python -m steadyvq` is the command `steadyvq`."""

import sys

from steadyvq.cli import main

sys.exit(main())
