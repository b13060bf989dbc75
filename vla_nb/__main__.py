"""`python -m vla_nb` is `vla-nb`."""
from vla_nb.apps.cli import main

raise SystemExit(main())
