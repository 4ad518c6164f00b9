#!/usr/bin/env bash
# install_test.sh BUILD README COMPILER...: installs the build into a temporary root, then does what
# the README tells a user to do: compiles the README's C++ program with what pkg-config says and
# with CMake, against the shared and against the static library, and runs all four. As C++17 it is
# refused in plain words. The same with the programs of examples/; the plan of examples/tune.cc must
# be that of the installed kvmix-tune, and examples/decode.c takes it. The programs of tools/
# compile against what was installed. The programs in Python start.
set -euo pipefail
build=$1 readme=$2
shift 2
compiler=("$@")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
die() { printf 'install_test: %s\n' "$*" >&2; exit 1; }

DESTDIR=$root/staged meson install -C "$build" --no-rebuild --quiet

awk '/^```cpp$/ { inside = 1; next } /^```$/ { inside = 0 } inside' "$readme" >"$root/program.cc"
grep -q 'int main' "$root/program.cc" || die "$readme holds no C++ program"

pc=$(find "$root/staged" -name kvmix.pc)
[ -n "$pc" ] || die "no kvmix.pc was installed"
libraries=$(dirname "$(dirname "$pc")")
export PKG_CONFIG_PATH=${pc%/*} PKG_CONFIG_SYSROOT_DIR=$root/staged

source=$(dirname "$readme")
compile() { # NAME FLAGS SOURCE...
  local flags as=("${compiler[@]}" -std=c++20)
  case $3 in *.c) as=("${CC:-cc}" -std=c11 -pedantic) ;; esac
  read -ra flags <<<"$2"
  "${as[@]}" -Wall -Wextra -Werror "${@:3}" -o "$root/$1" "${flags[@]}"
}
by_shared=$(pkg-config --cflags --libs kvmix)
# The linker prefers libkvmix.so, so the archive is named.
by_static=$(pkg-config --static --cflags --libs kvmix | sed 's/-lkvmix/-l:libkvmix.a/')
compile shared "$by_shared" "$root/program.cc"
compile static "$by_static" "$root/program.cc"

export LD_LIBRARY_PATH=$libraries
ldd "$root/shared" | grep "libkvmix.so.* => $libraries/" >/dev/null ||
  die "the program does not use the installed libkvmix.so"
# Each program runs without the shared library where it is linked without; all print the same.
same() { # SHARED STATIC ARGUMENT...
  local shared static
  if ldd "$2" | grep libkvmix; then die "the static program needs libkvmix.so"; fi
  shared=$("$1" "${@:3}") || die "$1 fails"
  static=$(env -u LD_LIBRARY_PATH "$2" "${@:3}") || die "$2 fails"
  [ -n "$shared" ] || die "the program printed nothing"
  [ "$shared" = "$static" ] || die "shared printed '$shared', static '$static'"
  printf 'shared and static: %s\n' "$shared"
}
same "$root/shared" "$root/static"

for example in decode.c decode.cc sequences.cc own_threads.cc; do
  compile "shared-$example" "$by_shared -pthread -lm" "$source/examples/$example"
  compile "static-$example" "$by_static -pthread" "$source/examples/$example"
  same "$root/shared-$example" "$root/static-$example"
done

include=$(dirname "$(find "$root/staged" -path '*/kvmix/export.h')")/..
if "${compiler[@]}" -std=c++17 -fsyntax-only -I"$include" "$root/program.cc" 2>"$root/errors"; then
  die "the headers compile as C++17"
fi
grep -m 1 'error: ' "$root/errors" | grep -q 'kvmix needs C++20' ||
  die "as C++17 the headers do not say that they need C++20: $(cat "$root/errors")"

if command -v cmake >/dev/null; then
  cat >"$root/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.18)
project(readme C)
find_package(kvmix 0.1 REQUIRED)
add_executable(in_c decode.c)
target_link_libraries(in_c kvmix::kvmix m)
enable_language(CXX)
foreach(target kvmix static)
  add_executable(with_${target} program.cc)
  target_link_libraries(with_${target} kvmix::${target})
endforeach()
foreach(target tune tune_static)
  add_executable(with_${target} tune.cc)
  target_link_libraries(with_${target} kvmix::${target})
endforeach()
END
  cp "$source"/examples/{decode.c,tune.cc} "$root"
  {
    cmake -S "$root" -B "$root/cmake" -DCMAKE_CXX_COMPILER="${compiler[-1]}" \
      -DCMAKE_PREFIX_PATH="$(find "$root/staged" -path '*/cmake/kvmix')" &&
      cmake --build "$root/cmake"
  } >"$root/cmake.log" 2>&1 || die "CMake cannot use the library: $(cat "$root/cmake.log")"
  same "$root/cmake/with_kvmix" "$root/cmake/with_static"
  same "$root/cmake/in_c" "$root/static-decode.c"
else
  printf 'install_test: SKIPPED the part with CMake: there is no cmake here\n' >&2
fi

# The tuner from a program, and the tool's own plan.
programs=$(dirname "$(find "$root/staged" -name kvmix-tune)")
sample=("$source"/data/sample/*.{calibration,holdout}.safetensors)
plan() { # NAME PROGRAM...
  mkdir "$root/$1"
  "${@:2}" "${sample[@]}" 0.45 "$root/$1/plan" 2>/dev/null || die "$1: tuning fails"
  diff -r "$root/tool" "$root/$1" || die "$1: another plan than the one of kvmix-tune"
}
mkdir "$root/tool"
"$programs/kvmix-tune" "${sample[0]}" --holdout "${sample[1]}" --budget 0.45 -o "$root/tool/plan" \
  >/dev/null
compile tune_shared "$(pkg-config --cflags --libs kvmix-tune)" "$source/examples/tune.cc"
compile tune_static "$(pkg-config --static --cflags --libs kvmix-tune |
  sed 's/-lkvmix\(-tune\)\?/-l:libkvmix\1.a/g')" "$source/examples/tune.cc"
plan by_shared "$root/tune_shared"
plan by_static env -u LD_LIBRARY_PATH "$root/tune_static"
same "$root/shared-decode.c" "$root/static-decode.c" "$root/tool/plan"
if [ -d "$root/cmake" ]; then
  for target in tune tune_static; do plan "by_cmake_$target" "$root/cmake/with_$target"; done
fi

# The programs of tools/ need no private header and no private name.
libraries_of_tools=$(env -u PKG_CONFIG_PATH -u PKG_CONFIG_SYSROOT_DIR \
  pkg-config --cflags CLI11 nlohmann_json fmt 2>/dev/null || true)
tool() { # NAME SOURCE...
  (cd "$source/tools" && compile "own-$1" "-O0 -w -DFMT_HEADER_ONLY=1 -DKVMIX_SOURCE_DATA=\"x\" \
    $libraries_of_tools $(pkg-config --cflags --libs kvmix-tune)" "${@:2}" console.cc dumps.cc) ||
    die "$1 does not compile against what was installed"
  [ "$("$root/own-$1" --help)" = "$("$programs/$1" --help)" ] || die "own-$1 does not run"
}
tool kvmix-tune kvmix_tune.cc plan_export.cc tune_options.cc tune_report.cc tune_report_json.cc
tool kvmix-eval kvmix_eval.cc

for name in kvmix-report kvmix-dump; do
  (cd / && "$programs/$name" --help) | grep -q "usage: $name" ||
    die "the installed $name does not start"
done
