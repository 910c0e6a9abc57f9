#!/bin/sh
# What SmolLM2 loses when it reads a part of its context: fidelity, long continuations, questions about documents, RULER.
#
# Usage: scripts/smollm2_fidelity.sh TEXTS OUT
#
# TEXTS has prose.jsonl, code.jsonl, reference.jsonl and dialogue.jsonl, such as the directory `test` that
# scripts/smollm2_corpus.py makes. Every part has a directory in OUT with results.json and report.md. What was measured is kept:
# a stopped run goes on when the same command is given again, and so does one that asks for more methods, budgets or lengths.
#
# The defaults want a GPU with 40 GiB free and as much host memory; SEATS=16 needs an eighth of that and takes longer. By hand:
#   SEATS=4 WINDOWS=2 COMPARE=16 LENGTHS=2048 KINDS=prose scripts/smollm2_fidelity.sh TEXTS OUT      # a look at it on a CPU
# HEAD=DIR takes another retrieval head, PARTS="fidelity ruler" leaves the others out, MODEL=PATH takes another model.
set -eu

if [ $# -ne 2 ]; then
    sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
texts=$1 out=$2
kinds=${KINDS:-prose code reference dialogue}
seats=${SEATS:-128}
methods=${METHODS:-full,speculative,oracle,shared-oracle,shared-oracle-bands3,quest,shadowkv,clusterkv,snapkv,h2o,streaming,random}
parts=${PARTS:-fidelity continuation documents ruler}

evaluate() {
    "${PYTHON:-python3}" -m specontext.cli eval "${MODEL:-smollm2}" --retrieval-head "${HEAD:-auto}" --max-num-seqs "$seats" \
        --max-num-batched-tokens "${CHUNK:-8192}" "$@"
}

about_texts() { # evaluate, with an option for every kind of text
    for kind in $kinds; do
        set -- "$@" --text "$texts/$kind.jsonl"
    done
    evaluate "$@"
}

for part in $parts; do
    echo "== $part" >&2
    case $part in
    fidelity)
        about_texts --suite fidelity --methods "$methods" --budgets "${BUDGETS:-1/32,1/16,1/8,1/4}" \
            --lengths "${LENGTHS:-2048,4096,8192}" --limit "${WINDOWS:-64}" --compare "${COMPARE:-64}" -o "$out/fidelity"
        ;;
    continuation) # 2,048 tokens after 2,048
        about_texts --suite continuation --methods "${LONG_METHODS:-full,speculative,shared-oracle,quest,shadowkv,snapkv,streaming}" \
            --budgets "${LONG_BUDGETS:-1/16,1/8}" --lengths "${LONG_LENGTHS:-4096}" --limit "${PROMPTS:-32}" \
            --new-tokens "${NEW_TOKENS:-2048}" -o "$out/continuation"
        ;;
    documents)
        about_texts --suite documents --methods "$methods" --budgets "${QUESTION_BUDGETS:-1/16,1/8}" \
            --lengths "${QUESTION_LENGTHS:-2048,4096}" --limit "${QUESTIONS:-64}" -o "$out/documents"
        ;;
    ruler) # the tasks that the model can do with full attention; see docs/evaluation.md
        evaluate --suite ruler --methods "$methods" --budgets "${QUESTION_BUDGETS:-1/16,1/8}" \
            --tasks "${TASKS:-niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multivalue,niah_multiquery,fwe}" \
            --lengths "${QUESTION_LENGTHS:-2048,4096}" --limit "${PROBLEMS:-100}" -o "$out/ruler"
        ;;
    *)
        echo "no part '$part': PARTS are fidelity, continuation, documents and ruler" >&2
        exit 2
        ;;
    esac
done
