"""Side-by-side comparisons of moefoundry with its peers. Start at ``run.py``; ``README.md`` says what is measured.

They measure the package in ``src`` beside them, whether or not it is installed.
"""

import sys
from pathlib import Path

SOURCE = str(Path(__file__).resolve().parents[1] / "src")

if SOURCE not in sys.path:
    sys.path.insert(0, SOURCE)
