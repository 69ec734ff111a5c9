"""The arithmetic of ``benchmarks.predict``: reading machine code, sharing a multiprocessor, filling waves."""

from __future__ import annotations

import random

import pytest

from benchmarks.gpu.layer import Shape
from benchmarks.predict.layer import Launch, work_of
from benchmarks.predict.machine_code import Code, gaps_of_loads, parse, split
from benchmarks.predict.model import SMS, Tile, Work, chip_of, predict, programs_of, schedule, step_latency, step_pipes

MACHINE_CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                            /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   IMAD.WIDE R6, R4, 0x4, R8 ;
        /*0030*/                   LDG.E R10, desc[UR4][R6.64] ;
        /*0040*/              @!P0 BRA 0x0120 ;
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24 ;
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR28], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/              @!PT LDS RZ, [RZ] ;
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R21], desc[UR22][R18.64], !P0 ;
        /*00b0*/               @P1 BRA 0x50 ;
        /*00c0*/                   F2FP.BF16.F32.PACK_AB R20, R89, R88 ;
        /*00d0*/                   STS.128 [R5], R20 ;
        /*00e0*/                   LDG.E R7, desc[UR4][R2.64] ;
        /*00f0*/                   STG.E.128 desc[UR4][R2.64], R20 ;
        /*0100*/                   LDG.E R7, desc[UR4][R2.64] ;
        /*0110*/                   STG.E desc[UR4][R2.64], R20 ;
        /*0120*/                   EXIT ;
"""
STEP_BYTES = (128 + 256) * 32 * 2


@pytest.fixture
def code() -> Code:
    return split(parse(MACHINE_CODE), warps=8, registers=168, shared=3 * STEP_BYTES)


def test_machine_code_is_cut_at_its_main_loop(code: Code) -> None:
    before, step, after = code.before, code.step, code.after
    assert step is not None
    assert after is not None
    assert (before.instructions, step.instructions, after.instructions) == (5, 7, 7)
    assert step.columns == (256, 256)
    assert step.operand_bytes == 2 * 256 * 32 + 64 * 32  # the second product's left operand is in registers
    assert (step.classes["copies"], step.product_waits) == (1, 0)
    assert (after.stored_bytes, after.shared_bytes) == (32 * (16 + 4), 32 * 16)


def test_a_kernel_without_products_may_be_cut_at_its_loop() -> None:
    lines = [line for line in parse(MACHINE_CODE) if line.base != "HGMMA"]
    for any_loop in (False, True):
        found = split(lines, warps=1, registers=32, shared=0, any_loop=any_loop)
        assert (found.step is not None) == any_loop
    assert found.step is not None
    assert found.step.instructions == 5
    chip, tiles = chip_of(800), 10**6
    few, many = (predict(found, Work([Tile(tiles, steps)], 0, 0, 0), chip).seconds for steps in (1, 11))
    assert many - few > 10 * tiles * 5 / 4 / SMS / chip.clock  # four schedulers issue them
    assert predict(found, Work([Tile(1, 1)], 0, 0, 0), chip).seconds > chip.latency


def test_loads_that_are_under_way_together_are_waited_for_once() -> None:
    lines = parse(MACHINE_CODE)
    table, uses_it, row = lines[1:4]
    assert gaps_of_loads([table, uses_it, row]) == (0,)  # the row's number is never used here
    assert gaps_of_loads([table, *lines[10:13], uses_it]) == (3,)
    assert gaps_of_loads([row, table, uses_it]) == (0,)


def test_a_step_takes_as_long_as_its_slowest_pipe(code: Code) -> None:
    chip = chip_of(798)
    pipes = step_pipes(code, STEP_BYTES, chip)
    assert pipes["tensor cores"] == 2 * 2 * 256 / 2  # two warp groups, two products of 64 x 256 x 16
    assert pipes["issue"] == 7 * 8 / 4
    work = Work([], STEP_BYTES, 0, 0)
    assert step_latency(code, work, chip) == max(*pipes.values(), (chip.latency * chip.clock + pipes["L2"]) / 2)
    slow = chip._replace(latency=1e-5)
    assert step_latency(code, work, slow) > 1e-5 * slow.clock / 2


def test_programs_share_registers_and_shared_memory(code: Code) -> None:
    assert programs_of(code) == 1
    assert programs_of(code._replace(registers=128)) == 2
    assert programs_of(code._replace(registers=32)) == 3  # of this shared memory


def test_a_kernel_is_bound_by_hbm_or_by_its_programs(code: Code) -> None:
    chip = chip_of(798)
    work = Work([Tile(SMS * 10, 64)], STEP_BYTES, 0, 0)
    bound = predict(code, work, chip)
    assert bound.limit == "programs"
    assert bound.seconds > bound.limits["tensor cores"]
    assert predict(code, work._replace(hbm_bytes=2 * int(bound.seconds * chip.hbm)), chip).limit == "HBM"
    one_more = predict(code, work._replace(tiles=[Tile(SMS * 10 + 1, 64)]), chip)
    assert one_more.seconds / bound.seconds == pytest.approx(1.1, abs=0.01)  # the last wave has one program


def test_waves_are_those_of_each_program_by_itself() -> None:
    chance = random.Random(0)
    for _ in range(20):
        costs = [(chance.randrange(1, 60), chance.choice([0.5, 1.0, 3.0])) for _ in range(5)]
        free = [0.0] * 7
        for cost in [cost for count, cost in costs for _ in range(count)]:
            place = free.index(min(free))
            free[place] += cost
        assert schedule(costs, 7) == pytest.approx(max(free))


def test_the_kernels_do_the_operations_of_the_layer(code: Code) -> None:
    shape = Shape(256, 512, 128, 8, 2)
    tiling = {"M": 128, "N": 128, "K": 64}
    rows_E = [64] * shape.E

    def operations(*kernels: str, **options: bool) -> int:
        return sum(work_of(Launch(name, {**tiling, **options}, code), shape, rows_E).operations for name in kernels)

    assert operations("up_swiglu", "down", "gather_sum") == shape.operations
    backward = operations("down_backward_swiglu", "up_backward", "gather_sum")
    backward += sum(operations("weight_gradient", GATHER_LEFT=left) for left in (True, False))
    assert backward == 2 * shape.operations
