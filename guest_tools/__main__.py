"""``python -m guest_tools`` is ``vsport-open``."""

from __future__ import annotations

import sys

from guest_tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
