#!/bin/sh
# The retrieval head of smollm2 that comes with specontext.
#
# Usage: scripts/train_smollm2_head.sh CORPUS OUT [more options of distill]
#
# CORPUS is what scripts/smollm2_corpus.py wrote. The head is written to OUT (11.7 MB, matrices in bfloat16), with log.jsonl and
# training.json beside it; a stopped training goes on with --resume. On one H200 that other work shared it took 8 min 22 s, 6.1 GiB.
# The head that comes with specontext is the one of step 749, which measured best; of heads that lose alike a later one is taken now.
# Logs, and the heads beside it that were not taken: benchmarks/results/smollm2-head.
set -eu
if [ $# -lt 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
corpus=$1 out=$2
shift 2
# Five bands of six layers for each of the three KV heads, two query heads a band, and one key that all of them share.
exec "${PYTHON:-python3}" -m specontext.cli distill smollm2 -o "$out" \
    --data "$corpus/train/prose.jsonl=3" --data "$corpus/train/code.jsonl=2.5" --data "$corpus/train/reference.jsonl=2.5" \
    --data "$corpus/train/dialogue.jsonl=1" --data "$corpus/train/lookups.jsonl=1" \
    --bands 5 --key-heads 1 --head-dim 512 --heads 30 --query-rank 240 \
    --length 8192 --tokens-per-step 32768 --queries 128 --replay-queries 64 --learning-rate 4e-3 \
    --steps 645 --loop-steps 212 --measure-every 107 --precision bfloat16 --recommended-budget 1024 --save-dtype bfloat16 "$@"
