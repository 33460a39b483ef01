#!/usr/bin/env bash
# All that only a GPU can say: first whether every bit is right, then how fast that is.
#
#     pip install ".[bench,models,test]" && tools/check_gpu.sh RESULTS
#
# Needs nvcc, and for some of it compute-sanitizer, on the PATH. What stages print goes into files in the
# folder RESULTS. One that fails does not keep the others from running; the exit status is how many failed.
# Arguments after the folder are the stages to run, of those at the end of this file.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${1:?the folder for the results}")
shift
mkdir -p "$results"
failed=0

stage() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  [[ ${#wanted[@]} == 0 || " ${wanted[*]} " == *" $name "* ]] || return 0
  echo "== $name, at most $seconds s: $*"
  local begin=$SECONDS
  if timeout "$seconds" "$@" > "$results/$name.out" 2> "$results/$name.err"; then
    echo "passed after $((SECONDS - begin)) s"
  else
    echo "FAILED with status $? after $((SECONDS - begin)) s"
    tail -n 30 "$results/$name.out" "$results/$name.err"
    failed=$((failed + 1))
  fi
}

wanted=("$@")
stage machine 30 nvidia-smi
stage doctor 120 df11-jax doctor
# Every bit, at all edges and of damaged payloads, in CUDA graphs, and under compute-sanitizer.
stage tests 900 pytest -m gpu -v -s -p no:cacheprovider
stage bench 600 df11-jax bench --plot "$results/bench.png"
# Beside the kernel of the dfloat11 package, if that and CuPy are installed.
stage published 120 python benchmarks/published_gpu.py
# Tokens per second and longest contexts, at the shapes of Llama-3.1-8B.
stage compare 900 df11-jax compare
for name in bench published compare; do
  [[ -s $results/$name.out ]] && echo "== $name" && cat "$results/$name.out"
done
exit "$failed"
