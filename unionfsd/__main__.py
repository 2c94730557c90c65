"""`python -m unionfsd`."""

import sys

from unionfsd.cli import main

sys.exit(main())
