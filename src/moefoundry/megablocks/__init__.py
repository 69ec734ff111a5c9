"""MegaBlocks 0.10.0 as it is published, on CUDA 13 and on CPUs: see ``docs/megablocks.md``.

from moefoundry.megablocks import provide

provide()
from megablocks.layers.dmoe import dMoE
"""

from moefoundry.megablocks.provider import INSTALL, provide

__all__ = ["INSTALL", "provide"]
