"""Kernels of which a step has many compile for Hopper, also where no GPU is at hand, and work in registers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

COMPILED = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from specontext.kernels.triton import quantized_linear, slot_plan, token_choice, top_k

WIDE = ("tokens", "seats", "readers", "sums", "chosen")
KINDS = dict.fromkeys(WIDE, "*i64") | {"scored": "*u8", "missing": "*u8", "resident": "*u8", "before": "*i32", "counts": "*fp64"}
found = {}

def compiled(name, kernel, warps=4, kinds=None, **constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else (KINDS | (kinds or {})).get(n, "i32") for n in names}
    given = {(names.index(n),): value for n, value in constants.items()}
    aligned = [(i,) for i, n in enumerate(names) if signature[n] == "*u8" or n == "row_bytes"]
    aligned += [(i, j) for i, n in enumerate(names) for j, kind in enumerate(signature[n]) if kind == "*u8"]
    whole = dict.fromkeys(aligned, [["tt.divisibility", 16]])
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=whole)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm
    found[name] = {"ptx": code["ptx"], "cubin": len(code["cubin"])}

for layers, groups in ((1, 1), (32, 8)):
    compiled(f"count {layers}", slot_plan._count_pairs, LOADS=layers > 1, LAYERS=layers, BITS=11, BLOCK=1024)
    compiled(f"add {groups}", slot_plan._keep_and_add, GROUPS=groups, BLOCK=1024)
for kind, block, warps in (("*fp32", 256, 4), ("*bf16", 2048, 8), ("*fp32", 8192, 16)):
    compiled(f"row {block}", top_k._held_row, warps, {"scores": kind}, BLOCK=block)

weights = {"codes": "*u8", "zeros": "*u8", "offset": "fp32"} | dict.fromkeys(("x", "scales", "bias", "out"), "*bf16")
for kind, number in quantized_linear.NUMBERS.items():
    scales = {"SCALE_ROWS": 1, "SCALE_COLUMNS": 128, "KIND": number, "HARDWARE": True, "HAS_ZEROS": kind == "int4"}
    tile = {"HAS_BIAS": True, "GROUP": 128}
    several = weights | {name: (weights[name],) * 3 for name in ("codes", "scales", "zeros", "bias")} | {"n_rows": ("i32",) * 3}
    one = tile | {"BLOCK_N": 4, "LANES": 128, "EARLY": True}
    compiled(f"row of {kind}", quantized_linear._one_row, 4, several, **scales, **one)
    for form in (tl.bfloat16, tl.float16, tl.float32):
        few = quantized_linear.few_tile(8192, 16, 4 if form == tl.float32 else 2)
        tile |= {"BLOCK_M": 16, "BLOCK_N": few.rows, "GROUPS": few.groups, "FORMAT": form}
        x = weights | dict.fromkeys(("x", "out"), "*" + form.name)
        compiled(f"rows of {kind} {form.name}", quantized_linear._few_rows, few.groups, x, **scales, **tile)

choice = dict.fromkeys(("tokens", "ints", "sums", "listed"), "*i64") | {"greatest": "*i32"}
choice |= {"numbers": "*fp64", "values": "*fp64"}
greedy = {"best": "*fp32", "token": "*i32", "found": "*i64"}
for form in ("bf16", "fp32"):
    logits = {"logits": "*" + form}
    compiled(f"best {form}", token_choice._best_of_parts, 4, greedy | logits, CHUNK=4096, BLOCK=1024)
    for group in (1, 32):
        compiled(f"survey {form} {group}", token_choice._survey, 8, choice | logits, CHUNK=4096, BLOCK=1024, GROUP=group)
        places = {"PARTS": 32, "GROUPS": 4096, "LISTED": 512, "NEAR": 256}
        compiled(f"choose {form} {group}", token_choice._choose, 16, choice | logits, GROUP=group, BLOCK=1024, **places)
compiled("best of rows", token_choice._best_of_rows, 4, greedy, PLACES=32)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def test_all_compile_and_nothing_is_kept_in_local_memory(found: dict[str, Any]) -> None:
    assert len(found) == 30 and all(one["cubin"] for one in found.values())
    assert not [name for name, one in found.items() if ".local" in one["ptx"]]


def test_counters_are_added_to_in_float64_by_those_who_may_share_a_seat(found: dict[str, Any]) -> None:
    added = [name for name, one in found.items() if re.search(r"(atom|red)[^;]*add[.]f64", one["ptx"])]
    assert added and all(name.startswith("add") for name in added)


def test_products_with_one_row_read_codes_before_they_wait(found: dict[str, Any]) -> None:
    for name, one in found.items():
        if name.startswith("row of"):
            matrices = one["ptx"].split("griddepcontrol.wait")[:-1]
            assert len(matrices) == 3 and "griddepcontrol.launch_dependents" in one["ptx"]
            assert all(re.search(r"ld\.global\.\S*v4", code) for code in matrices), f"{name} reads 16 bytes at once"
