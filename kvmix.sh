#!/usr/bin/env bash
# ./kvmix.sh demo    installs what is missing, builds into ./build and tunes the built-in sample down to a plan and a page of charts
# ./kvmix.sh test    installs what is missing, builds into ./build and runs all tests; closes with "N passed, N failed"
# Further arguments go to Meson, -Dwerror=true for one. Made for Debian 12 and 13, as root or with sudo; elsewhere it asks for the
# libraries to be there. A second run does only what is left to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

build=build
wrap=subprojects/highway.wrap
packages=(g++ meson ninja-build pkgconf dpkg-dev libgtest-dev libbenchmark-dev libcli11-dev nlohmann-json3-dev libfmt-dev
          python3-numpy python3-matplotlib)
export PATH=/usr/bin:/bin:$PATH  # Debian's Python first: it is the one that the Python packages above belong to
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

say() { printf '==> %s\n' "$*"; }
fail() { printf '%s: %s\n' "$0" "$*" >&2; exit 1; }

# Runs a command that talks much; its words are shown if it fails.
quietly() {
  local log status=0
  log=$(mktemp)
  "$@" >"$log" 2>&1 </dev/null || status=$?
  [ "$status" -eq 0 ] || cat "$log" >&2
  rm -f "$log"
  return "$status"
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo env DEBIAN_FRONTEND=$DEBIAN_FRONTEND "$@"; fi
}

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

updated=no
update_lists() {
  [ $updated = no ] || return 0
  say "apt-get update"
  quietly as_root apt-get -q update || say "apt-get update failed: going on with the lists that are there"
  updated=yes
}

install_packages() {
  local package missing=()
  for package in "$@"; do is_installed "$package" || missing+=("$package"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null || fail "run this as root, or install: ${missing[*]}"
  update_lists
  say "apt-get install ${missing[*]}"
  quietly as_root apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "${missing[@]}" || fail "apt-get install failed"
}

wrap_value() { sed -n "s/^$1 *= *//p" $wrap; }

have_archive() { [ -f "$archive" ] && echo "$(wrap_value source_hash)  $archive" | sha256sum --check --status; }

# The orig tarball of Debian's source package is the release archive, byte for byte: fetched by apt from the mirror that this machine
# uses, from whichever suite has it, in an apt configuration of its own so that the machine's stays as it is.
fetch_highway_from_debian() {
  local folder mirror suite keys version release
  release=$(wrap_value directory)
  mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Identifier: Packages' | awk '$1 == "Debian" && !n++ { print $2 }')
  [ -n "$mirror" ] || return 1
  folder=$(mktemp -d)
  mkdir -p "$folder"/lists/partial "$folder"/archives/partial
  keys=/usr/share/keyrings/debian-archive-keyring.gpg
  for suite in unstable testing; do
    echo "deb-src $([ ! -f $keys ] || echo "[signed-by=$keys]") $mirror $suite main" >>"$folder/sources.list"
  done
  cat >"$folder/apt.conf" <<END
Dir::State::Lists "$folder/lists";
Dir::Cache "$folder";
Dir::Etc::SourceList "$folder/sources.list";
Dir::Etc::SourceParts "/dev/null";
APT::Sandbox::User "root";
END
  (
    export APT_CONFIG=$folder/apt.conf
    cd "$folder"
    quietly apt-get -q update || exit 1
    version=$(apt-cache showsrc highway | awk -v want="${release#*-}-" '$1 == "Version:" && index($2, want) == 1 && !n++ { print $2 }')
    [ -n "$version" ] && quietly apt-get -q source --download-only --tar-only "highway=$version"
  ) && mkdir -p "$(dirname "$archive")" && cp "$folder"/highway_*.orig.tar.gz "$archive"
  rm -rf "$folder"
  have_archive
}

# Highway >= 1.2: the system's, else Debian's package, else the source archive that the wrap names.
get_highway() {
  archive=subprojects/packagecache/$(wrap_value source_filename)
  if pkg-config --exists 'libhwy >= 1.2' || have_archive || [ -d "subprojects/$(wrap_value directory)" ]; then return 0; fi
  if command -v apt-get >/dev/null; then
    update_lists
    local version
    version=$(apt-cache policy libhwy-dev | sed -n 's/^ *Candidate: *//p')
    if dpkg --compare-versions "${version:-0}" ge 1.2; then install_packages libhwy-dev; return; fi
    say "Highway: Debian's package is ${version:-missing}, 1.2 is needed: getting the source of $(wrap_value directory)"
    if fetch_highway_from_debian; then return 0; fi
    install_packages ca-certificates
  fi
  say "Highway: Meson will download $(wrap_value source_url)"
}

prepare() { # MESON-OPTION...
  if command -v apt-get >/dev/null; then
    install_packages "${packages[@]}"
  else
    say "this is not Debian: the counterparts of these packages must be there: ${packages[*]}"
  fi
  get_highway
  if [ ! -f $build/build.ninja ]; then
    say "meson setup $build -Dbuildtype=release${*:+ $*}"
    quietly meson setup $build -Dbuildtype=release "$@" || fail "meson setup failed"
  elif [ $# -gt 0 ]; then
    quietly meson configure $build "$@" || fail "meson configure failed"
  fi
}

compile() { # TARGET... (none: everything)
  quietly ninja -C $build build.ninja || fail "meson failed to set $build up again"
  say "ninja -C $build${*:+ $*}"
  if [ -t 1 ]; then ninja -C $build "$@"; else ninja -C $build --quiet "$@"; fi
}

demo() {
  local out=$build/demo
  local tune="$build/tools/kvmix-tune --budget 0.45"
  prepare "$@"
  compile tools/kvmix-tune tools/kvmix-eval tools/kvmix-report
  mkdir -p $out
  say "kvmix-tune --budget 0.45 -o $out/plan.json (without a dump: the built-in sample)"
  $tune -o $out/plan.json
  $tune --json >$out/tune.json
  say "kvmix-report: the same as a page, with the errors of every head"
  $build/tools/kvmix-report --sample --plan $out/plan.json $out/tune.json -o $out/report.html
  say "open file://$PWD/$out/report.html in a browser"
}

run_tests() {
  [ -n "${KVMIX_BROWSER:-}" ] || packages+=(chromium)  # the report's page is looked at in a browser
  prepare "$@"
  compile
  rm -f $build/*.xml  # GoogleTest's reports: those of an earlier run must not be counted
  say "meson test -C $build"
  meson test -C $build --no-rebuild --print-errorlogs </dev/null || true  # the count below judges
  python3 tests/count_results.py $build
}

command=${1:-}
shift || true
case $command in
  demo) demo "$@" ;;
  test) run_tests "$@" ;;
  *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
esac
