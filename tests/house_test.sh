#!/usr/bin/env bash
# house_test.sh SOURCE LIBRARY: the rules of the house that a command can check.
#   1. Highway is included under kernels/ only.      2. Every public header is installed.
#   3. libkvmix.so exports names of kvmix:: only.
set -euo pipefail
source=$1 library=$(realpath "$2")
failed=0
complain() { printf 'house_test: %s\n' "$*" >&2; failed=1; }

cd "$source"
strays=$(grep -rlE '#[[:space:]]*include[[:space:]]*[<"]hwy/' --include='*.h' --include='*.cc' --include='*.in' lib bench tools || true)
[ -z "$strays" ] || complain "Highway is included outside kernels/:" $strays

for header in lib/include/kvmix/*.h; do
  grep -q "'include/kvmix/$(basename "$header")'" lib/meson.build || complain "lib/meson.build does not install $header"
done

exported=$(nm -DC --defined-only "$library" | cut -d' ' -f3-)
[ "$(grep -c '^kvmix::' <<<"$exported")" -ge 10 ] || complain "$library exports hardly anything of kvmix::"
others=$(grep -v '^kvmix::' <<<"$exported" || true)
[ -z "$others" ] || complain "$library exports other names: $others"
exit $failed
