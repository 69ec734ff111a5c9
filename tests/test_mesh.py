"""From three numbers to degrees, without torch."""

import subprocess
import sys

import pytest

from moefoundry.config import ConfigError, MeshConfig
from moefoundry.mesh import MeshDegrees, resolve_degrees


@pytest.mark.parametrize(
    ("replicate", "shard", "expert", "world_size", "expected"),
    [
        (1, -1, 1, 1, (1, 1, 1)),
        (1, -1, 1, 8, (1, 8, 1)),
        (2, -1, 1, 8, (2, 4, 1)),
        (8, -1, 1, 8, (8, 1, 1)),
        (-1, 1, 1, 8, (8, 1, 1)),
        (-1, 4, 1, 8, (2, 4, 1)),
        (-1, 8, 8, 8, (1, 8, 8)),
        (2, 4, 1, 8, (2, 4, 1)),
        (2, 4, 2, 8, (2, 4, 2)),
        (2, -1, 4, 8, (2, 4, 4)),
        (32, 64, 64, 2048, (32, 64, 64)),
    ],
)
def test_degrees(replicate: int, shard: int, expert: int, world_size: int, expected: tuple[int, int, int]) -> None:
    degrees = resolve_degrees(MeshConfig(replicate, shard, expert), world_size)
    assert degrees == MeshDegrees(*expected)
    assert degrees.world_size == world_size


def product_error(replicate: int, shard: int, world_size: int) -> str:
    if replicate == -1 or shard == -1:
        key, known = ("mesh.shard", shard) if replicate == -1 else ("mesh.replicate", replicate)
        return f"{key}: {known} does not divide the world size {world_size}; allowed: "
    product = f"{replicate} * {shard} = {replicate * shard}"
    return f"mesh.shard: mesh.replicate * mesh.shard is {product}; allowed: the world size, {world_size}"


@pytest.mark.parametrize(
    ("replicate", "shard", "expert", "world_size", "message"),
    [
        (-1, -1, 1, 8, "mesh.shard: mesh.replicate and mesh.shard are both -1; allowed: at most one -1"),
        (2, 2, 1, 8, product_error(2, 2, 8)),
        (4, 4, 1, 8, product_error(4, 4, 8)),
        (3, -1, 1, 8, product_error(3, -1, 8)),
        (-1, 3, 1, 8, product_error(-1, 3, 8)),
        (16, -1, 1, 8, product_error(16, -1, 8)),
        (-1, 16, 1, 8, product_error(-1, 16, 8)),
        (0, 8, 1, 8, "mesh.replicate: got 0; allowed: a positive integer, or -1"),
        (2, 0, 1, 8, "mesh.shard: got 0; allowed: a positive integer, or -1"),
        (1, 8, 0, 8, "mesh.expert: got 0; allowed: a positive integer"),
        (1, 8, 3, 8, "mesh.expert: 3 does not divide mesh.shard, 8 of 8 ranks; allowed: 1, 2, 4, 8"),
        (2, -1, 8, 8, "mesh.expert: 8 does not divide mesh.shard, 4 of 8 ranks; allowed: 1, 2, 4"),
        (-1, 1, 2, 8, "mesh.expert: 2 does not divide mesh.shard, 1 of 8 ranks; allowed: 1"),
    ],
)
def test_impossible_degrees_are_refused_by_key(
    replicate: int, shard: int, expert: int, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_degrees(MeshConfig(replicate, shard, expert), world_size)
    assert message in str(caught.value)


def test_degrees_need_no_torch() -> None:
    code = (
        "import sys; from moefoundry.config import MeshConfig; from moefoundry.mesh import resolve_degrees; "
        "resolve_degrees(MeshConfig(), 4); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
