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
import json, re, torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specontext.kernels.triton import pieces, rows

KINDS = {"host": "*i8", "arena": "*i8", "pool": "*i8", "host_words": "*i32", "arena_words": "*i32", "words": "*i32"}
KINDS |= {"resident": "*u8", "key": "*bf16", "value": "*bf16", "seats": "*i64", "positions": "*i64", "lengths": "*i64"}

def stores(kernel, kinds=KINDS, **constants):
    names = kernel.arg_names
    kinds = {name: kinds.get(name, "*i64" if name.endswith("pages") else "i32") for name in names}
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
tier = {"TO_HOST": 1, **sizes}
print(json.dumps([stores(rows._append_to_tier, ARENA_KIND=1, **tier), stores(rows._append_to_pages, **sizes)]))
stores(rows._append_to_tier, KINDS | {"arena": "*bf16", "arena_words": "*bf16"}, ARENA_KIND=0, **tier)  # a host in 8 bits alone
loaded = {"source": "*i32", "target": "*bf16", "skipped": "*u8"}
loaded |= dict.fromkeys(("source_entries", "target_entries", "counts"), "*i32")
whole = [name for name in pieces._copy_pieces.arg_names if name.startswith(("part_l", "part_h", "part_g")) or name == "seats"]
whole += [f"{side}_{what}" for side in ("source", "target") for what in ("table", "line", "place")]
loaded |= dict.fromkeys(whole, "*i64") | dict.fromkeys(("source_pages", "target_pages"), "i32")
tile = pieces.codes_tile(torch.empty(1, 260, dtype=torch.int8), pieces.TILE_BYTES)
for kind in (1, 2):
    print(stores(pieces._copy_pieces, loaded, HEADS=8, SOURCE_PAGE=16, TARGET_PAGE=16, SOURCE_PLACES=8, TARGET_PLACES=1, LAYERS=8,
        LAYERS_PAD=8, WIDTH=tile.width, BLOCK=tile.block, REST=0, KIND=kind, PIECES=tile.rows // 8, STAGES=pieces.STAGES))
"""


def test_codes_are_stored_by_4_bytes_at_most() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", STORES], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for found in json.loads(ran.stdout.splitlines()[0]):
        assert found and set(found) <= {"b32", "b16", "b8"}
