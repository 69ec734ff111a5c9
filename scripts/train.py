"""Train a recipe: ``composer -n N scripts/train.py [RECIPE.yaml] [key=value ...]``."""

import sys

from moefoundry.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
