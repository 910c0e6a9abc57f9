"""Compiled kernels touch rows of 8-bit codes as widely as these are aligned: rows of 2 D + 4 bytes begin at multiples of 4."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Compiled for Hopper with what Triton is told of aligned arguments, where kernels are not interpreted.
STORES = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specontext.kernels.triton import rows

KINDS = {"host": "*i8", "arena": "*i8", "pool": "*i8", "host_words": "*i32", "arena_words": "*i32", "words": "*i32"}
KINDS |= {"resident": "*u8", "key": "*bf16", "value": "*bf16", "seats": "*i64", "positions": "*i64", "lengths": "*i64"}

def stores(kernel, **constants):
    names = kernel.arg_names
    kinds = {name: KINDS.get(name, "*i64" if name.endswith("pages") else "i32") for name in names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in kinds.items()}
    aligned = [i for i, name in enumerate(names) if name.endswith(("_token", "_head")) or signature[name].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    return sorted(set(re.findall(r"st[.]global[.]([a-z0-9.]+)", code)))

sizes = {"PAGE": 16, "PLACES": 8, "HEADS": 8, "DIM": 128, "BLOCK": 128, "ROWS": 16, "KIND": 1}
print(json.dumps([stores(rows._append_to_tier, TO_HOST=1, **sizes), stores(rows._append_to_pages, **sizes)]))
"""


def test_codes_are_stored_by_4_bytes_at_most() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", STORES], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for found in json.loads(ran.stdout.splitlines()[-1]):
        assert found and set(found) <= {"b32", "b16", "b8"}
