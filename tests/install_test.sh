#!/usr/bin/env bash
# install_test.sh BUILD README COMPILER...: installs the build into a temporary root, then does what
# the README tells a user to do: compiles the README's C++ program with what pkg-config says and
# with CMake, against the shared and against the static library, and runs all four. As C++17 it is
# refused in plain words. The programs in Python start.
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

compile() { # NAME FLAGS
  local flags
  read -ra flags <<<"$2"
  "${compiler[@]}" -std=c++20 -Wall -Wextra -Werror "$root/program.cc" -o "$root/$1" "${flags[@]}"
}
compile shared "$(pkg-config --cflags --libs kvmix)"
# The linker prefers libkvmix.so, so the archive is named.
compile static "$(pkg-config --static --cflags --libs kvmix | sed 's/-lkvmix/-l:libkvmix.a/')"

export LD_LIBRARY_PATH=$libraries
ldd "$root/shared" | grep "libkvmix.so.* => $libraries/" >/dev/null ||
  die "the program does not use the installed libkvmix.so"
# Each program runs without the shared library where it is linked without; all print the same.
same() { # SHARED STATIC
  local shared static
  if ldd "$2" | grep libkvmix; then die "the static program needs libkvmix.so"; fi
  shared=$("$1")
  static=$(env -u LD_LIBRARY_PATH "$2")
  [ -n "$shared" ] || die "the program printed nothing"
  [ "$shared" = "$static" ] || die "shared printed '$shared', static '$static'"
  printf 'shared and static: %s\n' "$shared"
}
same "$root/shared" "$root/static"

include=$(dirname "$(find "$root/staged" -path '*/kvmix/export.h')")/..
if "${compiler[@]}" -std=c++17 -fsyntax-only -I"$include" "$root/program.cc" 2>"$root/errors"; then
  die "the headers compile as C++17"
fi
grep -m 1 'error: ' "$root/errors" | grep -q 'kvmix needs C++20' ||
  die "as C++17 the headers do not say that they need C++20: $(cat "$root/errors")"

if command -v cmake >/dev/null; then
  cat >"$root/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.18)
project(readme CXX)
find_package(kvmix 0.1 REQUIRED)
foreach(target kvmix static)
  add_executable(with_${target} program.cc)
  target_link_libraries(with_${target} kvmix::${target})
endforeach()
END
  {
    cmake -S "$root" -B "$root/cmake" -DCMAKE_CXX_COMPILER="${compiler[-1]}" \
      -DCMAKE_PREFIX_PATH="$(find "$root/staged" -path '*/cmake/kvmix')" &&
      cmake --build "$root/cmake"
  } >"$root/cmake.log" 2>&1 || die "CMake cannot use the library: $(cat "$root/cmake.log")"
  same "$root/cmake/with_kvmix" "$root/cmake/with_static"
else
  printf 'install_test: SKIPPED the part with CMake: there is no cmake here\n' >&2
fi

programs=$(dirname "$(find "$root/staged" -name kvmix-tune)")
for name in kvmix-report kvmix-dump; do
  (cd / && "$programs/$name" --help) | grep -q "usage: $name" ||
    die "the installed $name does not start"
done
