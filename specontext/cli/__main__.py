"""`python -m specontext.cli`."""

import sys

from specontext.cli import main

sys.exit(main())
