#!/usr/bin/env bash
# house_test.sh SOURCE [TUNER]: the rules of the house that a command can check.
#   1. Who includes whom: kernels/ know nothing else but kvmix/types.h and keep Highway and their
#      -inl.h files to themselves; lib/ knows no program; lib/files knows no other part of lib/;
#      lib/tune stands on public headers, lib/files and lib/plan/model_json.h, and only bench/ and
#      tests know it; programs in tools/ stand on public headers,
#      and so do engines/; engines/common knows no engine.
#   2. Every public header is installed.
#   3. Lines have at most 100 columns, those of papers as well; one of 500 in C++ may be longer, for
#      strings.
#   4. Every `name` in CONTRIBUTING.md and docs/architecture.md exists.
#   5. TUNER, libkvmix-tune.so, exports names of kvmix::tune:: only, and no private ones (`Impl`).
#      (libkvmix.so: abi_test.py.)
set -euo pipefail
export LC_ALL=C.UTF-8
source=$1 tuner=${2:+$(realpath "$2")}
failed=0
complain() { printf 'house_test: %s\n' "$*" >&2; failed=1; }

cd "$source"

# No file under the folders includes a name that begins like the pattern.
forbid() { # RULE PATTERN FOLDER...
  local found
  found=$(grep -srnP "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]($2)" --include='*.h' \
    --include='*.cc' --include='*.c' --include='*.in' "${@:3}" || true)
  [ -z "$found" ] || complain "$1:"$'\n'"$found"
}
forbid "Highway is included outside kernels/" 'hwy/' lib engines bench tools tests
forbid "an -inl.h file is included outside kernels/" '[^>"]*-inl\.h' lib engines bench tools tests
forbid "kernels/ include only kernels/, Highway and kvmix/types.h" \
  '(lib|engines|tools|bench|tests|kvmix(?!/types\.h")|\.+)/' kernels
forbid "lib/ includes a program or a test" '(engines|tools|bench|tests)/' lib
forbid "lib/ and kernels/ name what they include from the root" '[^/>]*"|\.+/' lib kernels
forbid "only lib/tune includes lib/tune" 'lib/tune/' lib/files lib/plan lib/cache lib/include
forbid "lib/files includes another part of lib/" 'lib/(plan|cache)/' lib/files
forbid "lib/tune includes another part of lib/" 'kernels/|lib/(cache|run|plan/(?!model_json\.h"))' \
  lib/tune
forbid "a program in tools/ includes a private header" '(lib|kernels)/' tools/*.cc tools/*.h
forbid "a public header includes a private one" '(lib|kernels)/' lib/include
forbid "engines/ include a private header, or a program's" \
  '(lib|kernels|tools|bench|tests|\.+)/' engines
forbid "an example includes a private header" \
  '(lib|kernels|engines|tools|bench|tests|\.+)/' examples
forbid "engines/common knows an engine" '(ggml|llama|engines/[^c]|engines/c[^o])' engines/common

for header in lib/include/kvmix/*.h lib/include/kvmix/tune/*.h; do
  grep -q "'${header#lib/}'" lib/meson.build ||
    complain "lib/meson.build does not install $header"
done

# Prints the lines of more than 100 columns in files of these kinds.
wide() { # GLOB...
  local kind kinds=()
  for kind in "$@"; do kinds+=(--include="$kind"); done
  grep -srnE '.{101}' "${kinds[@]}" kernels lib engines tools bench tests examples \
    subprojects/packagefiles
}
# In papers tables and what is indented may be wider.
found=$({ wide '*.py' '*.sh' '*.build' '*.c'; grep -nE '.{101}' ./*.sh meson*
          grep -nE '^[^ |].{100}' ./*.md {bench,docs,kernels}/*.md {engines,data}/*/*.md; } || true)
[ -z "$found" ] || complain "lines of more than 100 columns:"$'\n'"$found"
found=$(wide '*.h' '*.cc' '*.in' || true)
lines=$(find kernels lib engines tools bench tests \( -name '*.h' -o -name '*.cc' \) \
  -exec cat {} + | wc -l)
[ "$(grep -c . <<<"$found")" -le $((lines / 500)) ] ||
  complain "too many lines of more than 100 columns:"$'\n'"$found"

# A name is a path, or the last part of X::Y stands in another file; XAny is any name.
missing() { # PAPER
  local name
  # shellcheck disable=SC2016
  grep -oP '`[A-Za-z_][\w/.:-]*(?=(\(\))?`)' "$1" | tr -d '`' | sort -u | while read -r name; do
    [[ $name == X[A-Z]* || -e $name ]] ||
      grep -rqF --exclude-dir='.*' --exclude-dir='build*' --exclude=CHANGELOG.md \
        --exclude="${1##*/}" -- "${name##*::}" "${tree[@]}" ||
      [ -n "$(find "${tree[@]}" -path "*$name" -print -quit)" ] || printf '%s\n' "$name"
  done
}
tree=(kernels lib engines tools bench tests examples docs ./*.md ./*.sh ./meson*)
for paper in CONTRIBUTING.md docs/architecture.md; do
  found=$(missing "$paper")
  [ -z "$found" ] || complain "$paper names what does not exist:"$'\n'"$found"
done

if [ -n "$tuner" ]; then
  exported=$(nm -DC --defined-only "$tuner" | cut -d' ' -f3-)
  [ "$(grep -c '^kvmix::tune::' <<<"$exported")" -ge 40 ] ||
    complain "$tuner exports hardly anything of kvmix::tune::"
  others=$(grep -v '^kvmix::tune::' <<<"$exported" || true)
  [ -z "$others" ] || complain "$tuner exports other names: $others"
  private=$(grep '::Impl::' <<<"$exported" || true)
  [ -z "$private" ] || complain "$tuner exports private names: $private"
fi
exit $failed
