"""Convert checkpoints: ``python scripts/convert_ckpt.py import | export | consolidate | upcycle ...``."""

import sys

from moefoundry.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
