#!/usr/bin/env bash
# install_test.sh BUILD README COMPILER...: installs the build into a temporary root, then does what the README tells a user to do:
# compiles the README's C++ program with what pkg-config says, against the shared and against the static library, and runs both. The
# programs in Python start.
set -euo pipefail
build=$1 readme=$2
shift 2
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

compile() { # NAME FLAG...
  "${compiler[@]}" -std=c++20 -Wall -Wextra -Werror "$root/program.cc" -o "$root/$1" "${@:2}"
}
compiler=("$@")
compile shared $(pkg-config --cflags --libs kvmix)
# The linker prefers libkvmix.so, so the archive is named.
compile static $(pkg-config --static --cflags --libs kvmix | sed 's/-lkvmix/-l:libkvmix.a/')

export LD_LIBRARY_PATH=$libraries
ldd "$root/shared" | grep "libkvmix.so.* => $libraries/" >/dev/null || die "the program does not use the installed libkvmix.so"
if ldd "$root/static" | grep libkvmix; then die "the static program needs libkvmix.so"; fi
shared=$("$root/shared")
static=$(env -u LD_LIBRARY_PATH "$root/static")
[ -n "$shared" ] || die "the program printed nothing"
[ "$shared" = "$static" ] || die "shared printed '$shared', static '$static'"
printf 'shared and static: %s\n' "$shared"

programs=$(dirname "$(find "$root/staged" -name kvmix-tune)")
for name in kvmix-report kvmix-dump; do
  (cd / && "$programs/$name" --help) | grep -q "usage: $name" || die "the installed $name does not start"
done
