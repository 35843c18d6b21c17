#!/usr/bin/env bash
# From a fresh checkout to a trained adapter and a few predictions:
#   bash launch/quickstart.sh [workdir]      (default: runs/quickstart in the checkout)
# A second run on the same workdir trains nothing again.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
  -*) fail "expected a workdir, or nothing, got '$1'" ;;
esac
[ $# -le 1 ] || fail "expected one workdir, got $# words; a path with blanks stands in quotes"
workdir=${1:-$ROOT/runs/quickstart}
case $workdir in /*) ;; *) workdir=$PWD/$workdir ;; esac
questions=$workdir/questions.jsonl
answers=$workdir/answers.jsonl

make_environment requirements.txt
cd "$ROOT"

say "training an adapter on questions by type (TREC) in $workdir"
"$python" -m adapters_jax.train --config=configs/quickstart.py --workdir="$workdir"

say 'evaluating it on the test split'
"$python" -m adapters_jax.evaluate --workdir="$workdir" --split=test

say 'predicting the type of five new questions'
cat >"$questions" <<'JSONL'
{"text": "Which chemist first isolated the element that glows in old watch dials ?"}
{"text": "How many strings does a mandolin have ?"}
{"text": "What port do ferries to the Orkney islands leave from ?"}
{"text": "Why does bread go stale faster in a refrigerator ?"}
{"text": "What does the abbreviation SQL stand for ?"}
JSONL
"$python" -m adapters_jax.predict \
  --adapter="$workdir/adapter" --input="$questions" --output="$answers"

"$python" - "$answers" <<'PYTHON'
import json
import pathlib
import sys

print()
for line in pathlib.Path(sys.argv[1]).read_text(encoding='utf-8').splitlines():
    answer = json.loads(line)
    print(f'  {answer["text"]:<74} -> {answer["label"]}')
print()
PYTHON

say "the adapter, ready to ship: $workdir/adapter"
say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
