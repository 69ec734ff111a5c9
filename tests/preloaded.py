"""What the ranks' server does once, after its imports, so that no rank has to: families, entry points, old garbage."""

import gc
import os
import sys

from moefoundry.conversion.families import FAMILIES

if "RANKS_PATH" in os.environ:  # entry points are looked up by the path, which ranks take over from pytest
    sys.path[:] = os.environ["RANKS_PATH"].split(os.pathsep)
assert [*FAMILIES.values()]
gc.collect()
gc.freeze()  # collections in a rank leave alone what it has from here, and that memory stays shared
