"""`python3 -m vsport` is `vsport`."""

import sys

from vsport.cli import main

sys.exit(main())
