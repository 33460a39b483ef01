#!/usr/bin/env bash
# All that only a GPU can say: first whether every bit is right, then how fast that is.
#
#     pip install ".[bench,benchmark,models,test]" && tools/check_gpu.sh RESULTS
#
# tests what is installed. Where that is to be made first, of the source tree or of a wheel, without a network:
#
#     tools/check_gpu.sh --install . RESULTS
#     tools/check_gpu.sh --install dist/df11_jax-*.whl RESULTS
#
# The stages are in tools/gpu_stages.txt (--list prints them, --stages takes another file); none takes more than nine
# minutes. What they print goes into files in the folder RESULTS. One that fails does not keep the others from
# running. The same command goes on where it was interrupted: stages that passed are not run again, unless they are
# named after the folder, which runs those alone. A table at the end tells of all; the exit status is 1 if a stage
# failed. Needs nvcc, and for some stages compute-sanitizer, on the PATH.
set -uo pipefail

install='' stages='' list=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --install) install=$(realpath "${2:?--install: . or a wheel}") && shift 2 || exit 2 ;;
    --stages) stages=$(realpath "${2:?--stages: a file}") && shift 2 || exit 2 ;;
    --list) list=yes && shift ;;
    *) echo "$0: there is no option $1" >&2 && exit 2 ;;
  esac
done
if [[ ! $list ]]; then
  RESULTS=$(realpath -m "${1:?the folder for the results}")
  export RESULTS
  shift
  mkdir -p "$RESULTS" || exit 2
fi
cd "$(dirname "$0")/.." || exit 2

names=()
declare -A seconds commands
add() {  # NAME SECONDS COMMAND
  names+=("$1")
  seconds[$1]=$2
  commands[$1]=$3
}
if [[ -d $install ]]; then
  # What builds it has to be there already: pyproject.toml names it under requires.
  add install 540 "pip install --no-deps --no-build-isolation -C cmake.define.DF11_CUDA=ON '$install'"
elif [[ $install ]]; then
  add install 540 "pip install --no-deps --force-reinstall '$install'"
fi
while read -r name most command; do
  [[ -z $name || $name == \#* ]] || add "$name" "$most" "$command"
done < "${stages:-tools/gpu_stages.txt}"

if [[ $list ]]; then
  for name in "${names[@]}"; do
    printf '%-20s %4s s  %s\n' "$name" "${seconds[$name]}" "${commands[$name]}"
  done
  exit
fi
for name in "$@"; do
  [[ ${commands[$name]+there} ]] || { echo "$0: there is no stage $name" >&2 && exit 2; }
done

say_last() {  # NAME STATUS: what a stage printed last
  local file=$RESULTS/$1.out
  [[ $2 != 0 && -s $RESULTS/$1.err ]] && file=$RESULTS/$1.err
  grep -v '^[[:space:]]*$' "$file" | tail -n 1 | cut -c 1-80
}

run_stage() {  # NAME
  local name=$1 begin=$SECONDS status result=passed
  echo "== $name, at most ${seconds[$name]} s: ${commands[$name]}"
  rm -f "$RESULTS/$name.result"
  timeout --kill-after=10 "${seconds[$name]}" bash -c "${commands[$name]}" \
    > "$RESULTS/$name.out" 2> "$RESULTS/$name.err" < /dev/null
  status=$?
  case $status in
    0) ;;
    124 | 137) result='TOO LONG' ;;
    *) result="FAILED, $status" ;;
  esac
  local last
  last=$(say_last "$name" "$status")
  # Where all tests of a stage are skipped, none has passed; 5 is pytest's status where it ran none.
  [[ $status =~ ^[05]$ && $last == *" skipped"* && $last != *" passed"* ]] && result=skipped
  printf '%s\t%s\t%s\n' "$result" "$((SECONDS - begin))" "$last" > "$RESULTS/$name.result"
  [[ $result == passed ]] || tail -n 30 "$RESULTS/$name.out" "$RESULTS/$name.err"
  echo "$result after $((SECONDS - begin)) s"
}

for name in "${names[@]}"; do
  if [[ $# -gt 0 ]]; then
    [[ " $* " != *" $name "* ]] || run_stage "$name"
  elif [[ $(cut -f 1 "$RESULTS/$name.result" 2> /dev/null) == passed ]]; then
    echo "== $name has passed before"
  else
    run_stage "$name"
  fi
  if [[ $name == install && $(cut -f 1 "$RESULTS/$name.result" 2> /dev/null) != passed* ]]; then
    echo "nothing else was run: what there is to test is not installed"
    break
  fi
done

failed=0
{
  printf '%-20s %-12s %6s  %s\n' stage result s 'printed last'
  for name in "${names[@]}"; do
    IFS=$'\t' read -r result took last < <(cat "$RESULTS/$name.result" 2> /dev/null || echo 'not run')
    printf '%-20s %-12s %6s  %s\n' "$name" "$result" "$took" "$last"
  done
} | tee "$RESULTS/summary.txt"
grep -qsE '^(FAILED|TOO LONG)' "$RESULTS"/*.result && failed=1
exit "$failed"
