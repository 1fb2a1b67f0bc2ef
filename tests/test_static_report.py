"""The static report: its parsers on snippets of real assembly, its refusals, and two compilations of a real kernel."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compiler import origins, static_report
from benchmarks.compiler.disassembly import (
    CLASSES,
    Resources,
    amd_resources,
    class_counts,
    classify,
    inner_loop,
    matrix_instructions,
    nvidia_resources,
    parse_amdgcn,
    parse_sass,
)
from benchmarks.compiler.shipped_launches import FAMILIES, KERNELS, MASKS, Case, dtype_name, shipped_cases, sum_cases
from benchmarks.compiler.static_report import SHARED_LIMIT_KIB, Row, measure, problems, tensor_cycles
from benchmarks.harness import report
from dual_lora_kernels.backends.triton.shapes import TABLE, PanelShape, ProductShape, load

SASS = """
		Function : weight_product_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000ff00000000800 */
        /*0010*/               @P1 BRA 0x80 ;                                  /* 0x0000001800041947 */
        /*0020*/                   IMAD.MOV.U32 R2, RZ, RZ, RZ ;               /* 0x000000ffff027224 */
        /*0030*/                   HGMMA.64x32x8.F32.TF32 R72, R64, gdesc[UR16], RZ, !UPT ;
        /*0040*/              @!P0 LDGSTS.E [R106+0x9000], desc[UR16][R6.64], !P1 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR24], R24, gsb0 ;
        /*0060*/                   STL.64 [R1+0x8], R4 ;
        /*0070*/              @!P1 BRA 0x20 ;                                  /* 0xffffffe800ec9947 */
        /*0080*/               @P0 EXIT ;                                      /* 0x000000000000794d */
        /*0090*/                   STG.E.128 desc[UR16][R22.64], R56 ;
        /*00a0*/                   EXIT ;                                      /* 0x000000000000794d */
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR7+0x6090], R4 ;
        /*00c0*/              @!P1 BRA 0xb0 ;
        /*00d0*/                   BRA 0x10 ;
        /*00e0*/                   BRA 0xe0;                                   /* 0xfffffffc00fc7947 */
        /*00f0*/                   NOP;                                        /* 0x0000000000007918 */
"""
RESOURCE_USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function weight_product_kernel:
  REG:125 STACK:40 SHARED:1024 LOCAL:8 CONSTANT[0]:688 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
AMDGCN = """
weight_product_kernel:                  ; @weight_product_kernel
.Lfunc_begin0:
	.loc	1 15 0 prologue_end             ; fused_kernels.py:15:0
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_4
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
.Ltmp9:
	v_dual_fmac_f32 v8, 0, v7 :: v_dual_and_b32 v21, 3, v0
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	ds_read_b128 v[0:3], v4
	ds_bpermute_b32 v4, v5, v6
	s_waitcnt lgkmcnt(0)
	global_load_dwordx4 v[0:3], v[4:5], off ; a comment
	s_cbranch_scc0 .LBB0_2
; %bb.3:
.LBB0_4:
	s_endpgm
	.amdhsa_private_segment_fixed_size 7
amdhsa.kernels:
  - .agpr_count:     16
    .private_segment_fixed_size: 456
    .sgpr_count:     24
    .sgpr_spill_count: 2
    .vgpr_count:     256
    .vgpr_spill_count: 160
"""


def test_sass_is_parsed_without_its_padding_and_its_inner_loop_found() -> None:
    program = parse_sass(SASS)
    assert [item.opcode for item in program[:3]] == ["LDC", "BRA", "IMAD.MOV.U32"]
    assert (program[1].target, program[7].target) == (8, 2)
    assert [index for index, item in enumerate(program) if item.ends] == [10]  # a conditional exit ends nothing
    assert len(program) == 14
    # The wait at 0xb0 jumps back to 0x10 from behind the end: no loop, though it would span the most instructions.
    assert inner_loop(program) == program[2:8]
    assert matrix_instructions(program) == {"HGMMA.64x32x8.F32.TF32": 1, "HGMMA.64x64x16.F32.BF16": 1}
    counts = class_counts(program[2:8])
    assert counts == {
        "matrix": 2, "integer": 1, "float": 0, "conversion": 0, "global": 1, "shared": 1, "other": 1
    }  # fmt: skip


def test_nvidia_resources_count_local_memory_and_its_instructions() -> None:
    assert nvidia_resources(RESOURCE_USAGE, parse_sass(SASS)) == Resources(registers=125, spills=1, stack_bytes=48)
    with pytest.raises(ValueError, match="no resource usage"):
        nvidia_resources("nothing", [])


def test_amdgcn_is_parsed_and_its_inner_loop_found() -> None:
    program = parse_amdgcn(AMDGCN)
    loop = inner_loop(program)
    assert loop == program[2:9]
    assert matrix_instructions(program) == {"v_mfma_f32_32x32x8_bf16": 1}
    assert class_counts(loop) == {
        "matrix": 1, "integer": 0, "float": 1, "conversion": 1, "global": 1, "shared": 1, "other": 2
    }  # fmt: skip


def test_amd_resources_come_from_the_metadata() -> None:
    assert amd_resources(AMDGCN) == Resources(registers=256, spills=162, stack_bytes=456)
    with pytest.raises(ValueError, match="sgpr_spill_count"):
        amd_resources(AMDGCN.replace(".sgpr_spill_count", ".renamed"))


def test_loops_with_matrix_instructions_come_first_and_the_longest_of_the_others_next() -> None:
    without = parse_amdgcn(AMDGCN.replace("v_mfma_f32_32x32x8_bf16", "v_fma_f32"))
    assert inner_loop(without) == without[2:9]
    longer = parse_amdgcn(AMDGCN + "\n".join([".LBB0_5:", *["\tv_fma_f32 v0, v1, v2, v3"] * 20, "\ts_branch .LBB0_5"]))
    assert inner_loop(longer) == longer[2:9]
    assert inner_loop(parse_amdgcn(AMDGCN.replace("s_cbranch_scc0 .LBB0_2", "s_nop 0"))) is None


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32.BF16", "matrix"),
        ("UTCHMMA", "matrix"),
        ("DMMA.8x8x4", "matrix"),
        ("IMAD.U32", "integer"),
        ("UIADD3", "integer"),
        ("LOP3.LUT", "integer"),
        ("VIMNMX", "integer"),
        ("CS2R", "integer"),
        ("FMNMX.NAN", "float"),
        ("FSETP.GT.AND", "float"),
        ("MUFU.RCP", "float"),
        ("DFMA", "float"),
        ("F2FP.BF16.F32.PACK_AB", "conversion"),
        ("PRMT", "conversion"),
        ("SHFL.BFLY", "conversion"),
        ("LDG.E.128", "global"),
        ("STL", "global"),
        ("LDGSTS.E.BYPASS.128", "shared"),
        ("LDSM.16.M88.4", "shared"),
        ("LDTM.16dp32bit_t0_t15.x16", "shared"),
        ("LDGDEPBAR", "other"),
        ("WARPGROUP.ARRIVE", "other"),
        ("BRA", "other"),
        ("v_wmma_f32_16x16x16_bf16", "matrix"),
        ("v_add3_u32", "integer"),
        ("s_lshl_b32", "integer"),
        ("v_max_f32_e32", "float"),
        ("v_cvt_u32_f32_e32", "conversion"),
        ("v_perm_b32", "conversion"),
        ("ds_bpermute_b32", "conversion"),
        ("global_store_d16_hi_b16", "global"),
        ("scratch_load_b128", "global"),
        ("ds_load_b128", "shared"),
        ("global_inv", "other"),
        ("s_wait_loadcnt", "other"),
        ("s_cbranch_scc1", "other"),
    ],
)
def test_instructions_are_classified(opcode: str, expected: str) -> None:
    assert classify(opcode) == expected


@pytest.fixture
def clean_row() -> Row:
    return Row(
        name="sm_90 forward bf16/fp32 256×128×32 8w 3s",
        family="sm_90",
        chip="sm_90",
        kernel="forward",
        compute="bf16",
        factors="fp32",
        rank=16,
        tile="256×128×32",
        warps=8,
        stages=3,
        up_to=None,
        registers=236,
        spills=0,
        stack_bytes=0,
        shared_bytes=110848,
        shared_limit=227 * 1024,
        matrix={"HGMMA.64x256x16.F32.BF16": 2},
        needs_matrix=True,
        step=dict.fromkeys(CLASSES, 1),
        whole=False,
        masks="none",
        four_bit=False,
        drawn=False,
        step_spills=0,
        issue_slots_per_element=None,
        issue_per_tensor_cycle=0.73,
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 7}, "7 spills"),
        ({"spills": 7, "masks": "all", "step_spills": 1}, "7 spills"),
        ({"spills": 7, "masks": "all", "whole": True}, "7 spills"),
        ({"spills": 201, "masks": "batch"}, "201 spills"),
        ({"matrix": {"HMMA.1688.F32.TF32": 48, "HGMMA.64x128x16.F32.BF16": 4}}, "mma.sync"),
        ({"stack_bytes": 16}, "16 bytes of stack"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"shared_bytes": 227 * 1024 + 1}, "bytes of shared memory"),
    ],
)
def test_check_fails_on_a_bad_row_and_names_it(
    clean_row: Row,
    change: dict[str, Any],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = dataclasses.replace(clean_row, **change)
    _pretend_to_measure(monkeypatch, [clean_row, bad])
    with pytest.raises(SystemExit, match="1 problems"):
        static_report.main(["--check", "--out", str(tmp_path)])
    (line,) = json.loads((tmp_path / "static_report.json").read_text(encoding="utf-8"))["problems"]
    assert complaint in line
    assert clean_row.name in line
    assert complaint in (tmp_path / "static_report.md").read_text(encoding="utf-8")
    assert complaint.split()[-1] in capsys.readouterr().out


def test_check_accepts_clean_rows(clean_row: Row, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_matrix_unit = dataclasses.replace(clean_row, matrix={}, needs_matrix=False)
    at_the_limit = dataclasses.replace(clean_row, shared_bytes=clean_row.shared_limit)
    once_a_tile = dataclasses.replace(clean_row, masks="all", spills=200, stack_bytes=400)
    rows = [clean_row, without_matrix_unit, at_the_limit, once_a_tile]
    _pretend_to_measure(monkeypatch, rows)
    static_report.main(["--check", "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "static_report.json").read_text(encoding="utf-8"))["rows"]) == 4


def _pretend_to_measure(monkeypatch: pytest.MonkeyPatch, rows: list[Row]) -> None:
    monkeypatch.setattr(static_report, "measure_all", lambda *_: (rows, []))


def test_tensor_cycles_count_the_main_and_the_rank_products() -> None:
    shape = ProductShape(block_m=128, block_n=128, block_k=64, warps=8, stages=3)
    main, rank = 512, 128 * 64 * 32
    assert tensor_cycles("forward", shape, torch.bfloat16, 16) == main + rank / 2048
    assert tensor_cycles("forward", shape, torch.float32, 16) == main + 3 * rank / 1024
    assert tensor_cycles("token_product", shape, torch.float32, 16) == main


def test_every_shipped_shape_of_every_family_is_a_case() -> None:
    cases = list(shipped_cases())
    assert {case.family for case in cases} == set(FAMILIES)
    assert {case.chip for case in cases} == set(SHARED_LIMIT_KIB)
    for family in SHARED_LIMIT_KIB:
        combinations: dict[tuple[str, str, str], set[tuple[torch.dtype, int]]] = {}
        for case in cases:
            if case.family == family:
                found = combinations.setdefault((case.kernel, case.tile, case.masks), set())
                found.add((case.factor_dtype, case.rank))
        assert {kernel for kernel, *_ in combinations} == set(KERNELS)
        for (_, _, masks), found in combinations.items():
            small, large = (16, 32) if masks == "none" else (12, 24)
            expected = {(torch.float32, small), (torch.bfloat16, small)}
            if TABLE[family].fused_rank == 32:
                expected.add((torch.float32, large))
            assert found == expected
        assert {masks for *_, masks in combinations} == set(MASKS)


def test_the_committed_report_is_of_the_shipped_shapes() -> None:
    """Whoever changes a tile runs the report again."""
    rows = json.loads((report.RESULTS / "static_report.json").read_text(encoding="utf-8"))["rows"]
    reported = {(row["chip"], row["kernel"], row["compute"], row["factors"], row["rank"], row["tile"]) for row in rows}
    shipped = {
        (case.chip, case.kernel, dtype_name(case.compute_dtype), dtype_name(case.factor_dtype), case.rank, case.tile)
        for case in (*shipped_cases(), *sum_cases())
    }
    assert reported == shipped


def test_the_tables_origins_have_the_committed_reports_counts() -> None:
    """Whoever runs the report again runs `benchmarks.compiler.origins` too."""
    document = json.loads((report.RESULTS / "static_report.json").read_text(encoding="utf-8"))
    assert origins.renewed(document) == TABLE


def test_an_origin_says_what_the_report_counted() -> None:
    row = {"spills": 0, "rank": 16, "issue_slots_per_element": None, "issue_per_tensor_cycle": None}
    fp32, bf16 = {**row, "factors": "fp32"}, {**row, "factors": "bf16"}
    wide = {**fp32, "rank": 32}
    assert origins.origin([fp32, bf16], "3.9") == "static count, triton 3.9: no spill"
    assert origins.origin([fp32, bf16, wide | {"spills": 2}], "3.9") == "static count, triton 3.9: 2 spills"
    counts = [each | {"issue_slots_per_element": count} for each, count in ((fp32, 20.04), (wide, 99.0), (bf16, 17.06))]
    expected = "static count, triton 3.9: no spill, 20.0 / 17.1 lane-instructions per element of W"
    assert origins.origin(counts, "3.9") == f"{expected} with fp32 / bf16 factors"
    ratios = [each | {"issue_per_tensor_cycle": 0.814} for each in counts]
    assert origins.origin(ratios, "3.9") == f"{expected}, 0.81 / 0.81 issue per tensor cycle with fp32 / bf16 factors"


def test_renewed_origins_are_those_of_static_counts_alone(tmp_path: Path) -> None:
    document = json.loads((report.RESULTS / "static_report.json").read_text(encoding="utf-8"))
    shapes = TABLE["sm_90"]
    outdated = dataclasses.replace(shapes.token_product, source="static count, triton 3.5: 7 spills")
    measured = dataclasses.replace(shapes.effective_weight, source="measured: NVIDIA H100")
    table = TABLE | {"sm_90": dataclasses.replace(shapes, token_product=outdated, effective_weight=measured)}
    assert origins.renewed(document, table) == TABLE | {"sm_90": dataclasses.replace(shapes, effective_weight=measured)}
    origins.main(tmp_path / "table.json")
    assert load(tmp_path / "table.json") == TABLE


def test_a_kernel_compiles_for_an_h100_and_its_tensor_cycles_match_its_instructions() -> None:
    shape = ProductShape(block_m=64, block_n=64, block_k=32, warps=4, stages=2, up_to=64)
    row = measure(Case("sm_90", "sm_90", "forward", shape, torch.bfloat16, torch.float32))
    assert problems([row]) == []
    assert 32 < row.registers <= 255
    assert not row.whole
    assert row.issue_per_tensor_cycle is not None
    cycles = 0.0
    for name, count in row.matrix.items():
        dimensions, _, dtype = name.removeprefix("HGMMA.").split(".")
        m, n, k = map(int, dimensions.split("x"))
        cycles += count * m * n * k / {"BF16": 2048, "TF32": 1024}[dtype]
    assert cycles == tensor_cycles("forward", shape, torch.float32, 16)  # one warp group, so one instruction stream
    assert row.issue_per_tensor_cycle == sum(row.step.values()) / cycles  # 4 warps on 4 schedulers


def test_a_kernel_that_does_not_compile_is_a_problem(
    clean_row: Row, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shape = PanelShape(rows=48, columns=64, warps=4, stages=1)  # no power of two
    failure = static_report.attempt(Case("gfx942", "gfx942", "effective_weight", shape, torch.bfloat16, torch.bfloat16))
    assert isinstance(failure, str)
    assert "gfx942 effective_weight bf16/bf16 48×64 4w 1s: does not compile" in failure
    monkeypatch.setattr(static_report, "measure_all", lambda *_: ([clean_row], [failure]))
    with pytest.raises(SystemExit, match="1 problem"):
        static_report.main(["--check", "--out", str(tmp_path)])


def test_a_kernel_compiles_for_an_mi300() -> None:
    shape = PanelShape(rows=32, columns=64, warps=4, stages=1)
    row = measure(Case("gfx942", "gfx942", "effective_weight", shape, torch.bfloat16, torch.bfloat16))
    assert problems([row]) == []
    assert any(name.startswith("v_mfma") and name.endswith("bf16") for name in row.matrix)
    assert 0 < row.registers <= 512
    assert row.whole
    assert row.issue_slots_per_element == sum(row.step.values()) * 4 * 64 / (32 * 64)
