#!/usr/bin/env bash
# ./kvmix.sh demo     builds into ./build and tunes the built-in sample: a plan, a page of charts
# ./kvmix.sh test     builds into ./build and runs all tests; closes with "N passed, N failed"
# Each installs what is missing; further arguments go to Meson, -Dwerror=true for one. Made for
# Debian 12 and 13, as root or with sudo; elsewhere it asks for the libraries to be there. A second
# run does only what is left to do. For who changes kvmix:
# ./kvmix.sh lint     checks the format of all sources and the rules of the house
# ./kvmix.sh tidy     looks for bugs with clang-tidy; takes minutes
# ./kvmix.sh fuzz     feeds damaged files to the readers for two minutes
# ./kvmix.sh check    lint, then all tests with clang, with sanitizers and with gcc: what CI runs
# ./kvmix.sh llama    runs llama.cpp with kvmix inside: fetches and builds it, tunes, measures
# ./kvmix.sh slurm    tunes the sample on a Slurm cluster of this machine alone; a task is killed
# ./kvmix.sh graphs   compares graphs of llama.cpp through the plug-in with ggml's own results
# KVMIX_BUILD names another build folder, CXX another compiler for a new one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

build=${KVMIX_BUILD:-build}
packages=(g++ meson ninja-build pkgconf dpkg-dev libgtest-dev libbenchmark-dev libcli11-dev
          nlohmann-json3-dev libfmt-dev libxxhash-dev python3-numpy python3-matplotlib)
# Debian's Python first: it is the one that the Python packages above belong to.
export PATH=/usr/bin:/bin:$PATH
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive
. tools/shell.sh
. tools/get_highway.sh
. tools/check.sh
. tools/llama_cpp/llama.sh

prepare() { # MESON-OPTION...
  install_packages "${packages[@]}"
  get_highway
  if [ ! -f "$build"/build.ninja ]; then
    say "meson setup $build -Dbuildtype=release${*:+ $*}"
    quietly meson setup "$build" -Dbuildtype=release "$@" || fail "meson setup failed"
  elif [ $# -gt 0 ]; then
    quietly meson configure "$build" "$@" || fail "meson configure failed"
  fi
}

compile() { # TARGET... (none: everything)
  quietly ninja -C "$build" build.ninja || fail "meson failed to set $build up again"
  say "ninja -C $build${*:+ $*}"
  if [ -t 1 ]; then ninja -C "$build" "$@"; else ninja -C "$build" --quiet "$@"; fi
}

demo() {
  local out=$build/demo
  local tune="$build/tools/kvmix-tune --budget 0.45"
  prepare "$@"
  compile tools/kvmix-tune tools/kvmix-eval tools/kvmix-report
  mkdir -p "$out"
  say "kvmix-tune --budget 0.45 -o $out/plan.json (without a dump: the built-in sample)"
  $tune -o "$out"/plan.json
  $tune --json >"$out"/tune.json
  say "kvmix-report: the same as a page, with the errors of every head"
  "$build"/tools/kvmix-report --sample --plan "$out"/plan.json "$out"/tune.json \
    -o "$out"/report.html
  say "open file://$PWD/$out/report.html in a browser"
}

run_tests() {
  packages+=(cmake)
  [ -n "${KVMIX_BROWSER:-}" ] || packages+=(chromium)  # to look at the report's page
  prepare "$@"
  compile
  rm -f "$build"/*.xml  # GoogleTest's reports: those of an earlier run must not be counted
  say "meson test -C $build"
  meson test -C "$build" --no-rebuild --print-errorlogs </dev/null || true  # the count judges
  python3 tests/count_results.py "$build"
}

command=${1:-}
shift || true
case $command in
  demo) demo "$@" ;;
  test) run_tests "$@" ;;
  lint | tidy | fuzz | check | llama | slurm | graphs) "$command" ;;
  *) sed -n '2,15s/^# //p' "$0"; exit 2 ;;
esac
