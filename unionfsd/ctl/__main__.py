"""``python -m unionfsd.ctl``: the same as ``unionfsctl``."""

from unionfsd.ctl.main import main

raise SystemExit(main())
