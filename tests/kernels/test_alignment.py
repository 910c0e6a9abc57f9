"""Compiled kernels touch memory as widely as rows allow: codes that lie in spans by 16 bytes, rows by themselves by 4 at most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

# Compiled for Hopper with what Triton is told of aligned arguments, where kernels are not interpreted.
WIDTHS = """
import json, re, torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specontext.kernels.triton import coded_attention, pieces, rows

KINDS = {"host": "*i8", "arena": "*i8", "pool": "*i8", "host_words": "*i32", "arena_words": "*i32", "words": "*i32"}
KINDS |= {"resident": "*u8", "key": "*bf16", "value": "*bf16", "seats": "*i64", "positions": "*i64", "lengths": "*i64"}

def widths(kernel, kinds=KINDS, **constants):
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
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3}).asm["ptx"]
    loads = re.findall(r"cp[.]async[.]c[ag][.]shared[.]global[^;]*?, (0x[0-9a-f]+),", code)
    by_byte = len(re.findall(r"ld[.]shared[.][bsu]8", code))
    return sorted(set(re.findall(r"st[.]global[.]([a-z0-9.]+)", code))), max(int(x, 16) for x in loads) if loads else 0, by_byte

PAGE, HEADS, DIM = 16, 8, 128
sizes = {"PAGE": PAGE, "PLACES": 8, "HEADS": HEADS, "DIM": DIM, "BLOCK": DIM, "ROWS": 16, "KIND": 1, "PARTS": 2}
tier, found = {"TO_HOST": 1, **sizes}, {}
found["append"] = [widths(rows._append_to_tier, ARENA_KIND=1, SPAN=n * 8, ARENA_SPAN=n, **tier)[0] for n in (1, PAGE * HEADS)]
found["append to pages"] = [widths(rows._append_to_pages, SPAN=n, **sizes)[0] for n in (1, PAGE * HEADS * 8)]
to_numbers = KINDS | {"arena": "*bf16", "arena_words": "*bf16"}  # a host in 8 bits alone
found["to numbers"] = widths(rows._append_to_tier, to_numbers, ARENA_KIND=0, SPAN=PAGE * HEADS * 8, ARENA_SPAN=0, **tier)[0]

copied = {"source": "*i32", "target": "*i32", "skipped": "*u8"}
copied |= dict.fromkeys(("source_entries", "target_entries", "counts"), "*i32")
whole = [name for name in pieces._copy_pieces.arg_names if name.startswith(("part_l", "part_h", "part_g")) or name == "seats"]
whole += [f"{side}_{what}" for side in ("source", "target") for what in ("table", "line", "place")]
copied |= dict.fromkeys(whole, "*i64") | dict.fromkeys(("source_pages", "target_pages"), "i32")
held = torch.empty(1, PAGE * HEADS * 8, 2 * DIM + 4, dtype=torch.int8)

def copies(tile, kinds, kind, span):
    return widths(pieces._copy_pieces, copied | kinds, HEADS=HEADS, SOURCE_PAGE=PAGE, TARGET_PAGE=PAGE, SOURCE_PLACES=8,
        TARGET_PLACES=1, LAYERS=8, LAYERS_PAD=8, WIDTH=tile.width, BLOCK=tile.block, REST=tile.rest, KIND=kind,
        PIECES=tile.rows // 8, STAGES=pieces.STAGES, SOURCE_SPAN=PAGE * HEADS * 8, TARGET_SPAN=span)

for name, span in (("to slots", PAGE * HEADS), ("to a buffer", 1)):
    found[name] = copies(pieces.row_tile(held, pieces.TILE_BYTES), {}, 0, span)
for kind in (1, 2):
    found[f"loads as numbers {kind}"] = copies(pieces.codes_tile(held, pieces.TILE_BYTES), {"target": "*bf16"}, kind, 0)

# Rows that follow each other: of new tokens as a chunk has them, and of a tile, each by itself.
words = {"pool": "*i32", "new": "*i32", "target": "*i32", "wanted": "*u8", "seats": "*i64", "positions": "*i64"}
for dim in (DIM, 18):
    tile = pieces.row_tile(torch.empty(1, 1, 2 * dim + 4, dtype=torch.int8), pieces.TILE_BYTES)
    shape = {"PAGE": PAGE, "HEADS": HEADS, "WIDTH": tile.width, "BLOCK": tile.block, "REST": tile.rest}
    found[f"chunk {dim}"] = widths(pieces._append_pieces, words, PLACES=8, PLACES_PAD=8, PIECES=tile.rows // 8,
        SPAN=PAGE * HEADS * 8, STAGES=pieces.STAGES, **shape)
    found[f"tile {dim}"] = widths(rows._gather_tokens, words, PLACES=1, ROWS=16, SPAN=PAGE * HEADS, **shape)[0]

read = {"query_ptr": "*bf16", "arena_ptr": "*fp8e4nv", "words_ptr": "*i32", "index_ptr": "*i32", "lengths_ptr": "*i64"}
read |= {"output_ptr": "*fp32", "lse_ptr": "*fp32", "scale_log2": "fp32", "cap_log2": "fp32"}
shape = {"DIM": DIM, "DIM_PAD": DIM, "BLOCK": 64, "FINAL": False, "CAPPED": False, "COMPILED": True}

def reads(span, group, codes="*fp8e4nv", query="*bf16", page=0):
    names = read | {"arena_ptr": codes, "query_ptr": query}
    padded = max(coded_attention.LEAST, group)
    return widths(coded_attention._attend, names, GROUP=group, GROUP_PAD=padded, PAGE_SIZE=page, SPAN=span,
        BY_PAGE=page > 0, TWICE=query == "*fp32", **shape)[1:]

for codes in ("*fp8e4nv", "*i8"):
    for group, query in ((4, "*bf16"), (16, "*fp16"), (1, "*fp32")):
        found[f"read {codes} {group}"] = [reads(PAGE * HEADS, group, codes, query, page) for page in (0, PAGE)]
found["read by themselves"] = reads(1, 4)

latent = {"HEADS": 1, "DIM": 576, "BLOCK": 1024, "ROWS": 4, "PARTS": 1}  # of DeepSeek's models
found["append latents"] = [
    widths(rows._append_to_tier, ARENA_KIND=1, SPAN=PAGE * 8, ARENA_SPAN=PAGE, **tier | latent)[0],
    widths(rows._append_to_tier, to_numbers, ARENA_KIND=0, SPAN=PAGE * 8, ARENA_SPAN=0, **tier | latent)[0],
    widths(rows._append_to_pages, SPAN=PAGE, **sizes | latent)[0],
]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", WIDTHS], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def test_codes_in_spans_cross_a_bus_and_come_to_attention_by_16_bytes(found: dict[str, Any]) -> None:
    stores, load, _ = found["to slots"]
    assert load == 16 and "v4.b32" in stores
    assert found["to a buffer"][1] == 16 and found["loads as numbers 1"][1] == found["loads as numbers 2"][1] == 16
    reads = [widths for name, both in found.items() if name.startswith("read *") for widths in both]
    assert len(reads) == 12 and all(x == [16, 0] for x in reads), "and values are laid out as numbers, not byte by byte"
    assert (
        "v4.b32" in found["chunk 128"][0]
        and "v4.b32" in found["append"][1]
        and "v4.b32" in found["append to pages"][1]
        and "v4.b32" in found["to numbers"]
    )
    assert all("v4.b32" in stores for stores in found["append latents"])


def test_codes_of_rows_by_themselves_are_touched_by_4_bytes_at_most(found: dict[str, Any]) -> None:
    for stores in (found["append to pages"][0], found["to a buffer"][0]):
        assert stores and set(stores) <= {"b32", "b16", "b8"}
    assert found["read by themselves"][0] <= 4
    assert found["chunk 128"][1] <= 8, "of their seats and positions"
    for stores in (found["chunk 18"][0], found["tile 128"], found["tile 18"]):
        assert stores and set(stores) <= {"b32", "b16", "b8"}
