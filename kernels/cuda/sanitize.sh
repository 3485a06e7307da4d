#!/bin/sh
# Runs compute-sanitizer over small cases of every kernel, on a machine with a Hopper GPU:
#   sh kernels/cuda/sanitize.sh [path of the device program]
# One line a tool and filter; exit status 1 if any found an error. Full output of failures follows the line.
device=${1:-target/release/device}
log=$(mktemp)
failed=0
run() { # tool, filter of `device check`
    compute-sanitizer --tool "$1" --print-limit 5 --error-exitcode 9 "$device" check "$2" >"$log" 2>&1
    status=$?
    cases=$(grep -c ' right$' "$log")
    if [ $status -eq 0 ] && [ "$cases" -gt 0 ]; then
        echo "$1: $2: clean, $cases cases"
    else
        echo "$1: $2: FAILED ($status)"
        grep -v ' right$' "$log" | head -40
        failed=1
    fi
}
for tool in memcheck racecheck; do
    while read -r filter; do run "$tool" "$filter"; done <<'END'
add_norm rows 7
swiglu rows 3
quantise rows 77
rope rows 1
cache_write rows 37
gather scatter rows 37
gate v3 random tokens 128
dispatch permute combine tokens 33
sample vocab 1017
mla_decode heads 32 queries 2 block edges
mla_decode heads 128 queries 1 four long
mla_prefill heads 16 a tile
mla_prefill heads 32 ragged
m 61 n 320 k 1024
m 125 n 320 k 1024
8 groups n 512 k 256
END
done
rm -f "$log"
exit $failed
