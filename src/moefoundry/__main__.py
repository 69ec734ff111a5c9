"""``python -m moefoundry`` is the ``moefoundry`` command."""

import sys

from moefoundry.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
