# shellcheck shell=bash
# What kvmix.sh and its parts share: messages, and Debian packages installed where they are missing.
# Sourced, not run.

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
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo env DEBIAN_FRONTEND=noninteractive "$@"; fi
}

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

updated=no
update_lists() {
  [ $updated = no ] || return 0
  say "apt-get update"
  quietly as_root apt-get -q update ||
    say "apt-get update failed: going on with the lists that are there"
  updated=yes
}

install_packages() {
  local package missing=()
  if ! command -v apt-get >/dev/null; then
    say "this is not Debian: the counterparts of these packages must be there: $*"
    return 0
  fi
  for package in "$@"; do is_installed "$package" || missing+=("$package"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null ||
    fail "run this as root, or install: ${missing[*]}"
  update_lists
  say "apt-get install ${missing[*]}"
  quietly as_root apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends \
    "${missing[@]}" || fail "apt-get install failed"
}
