# shellcheck shell=bash
# Gets Highway >= 1.2: the system's, else Debian's package, else the source archive that Meson's
# wrap names. Sourced by kvmix.sh, after tools/shell.sh.

wrap=subprojects/highway.wrap

wrap_value() { sed -n "s/^$1 *= *//p" $wrap; }

have_archive() {
  [ -f "$archive" ] && echo "$(wrap_value source_hash)  $archive" | sha256sum --check --status
}

# The orig tarball of Debian's source package is the release archive, byte for byte: fetched by apt
# from the mirror that this machine uses, from whichever suite has it, in an apt configuration of
# its own so that the machine's stays as it is.
fetch_highway_from_debian() {
  local folder mirror suite keys version release
  release=$(wrap_value directory)
  # shellcheck disable=SC2016  # the variables are apt's
  mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Identifier: Packages' |
    awk '$1 == "Debian" && !n++ { print $2 }')
  [ -n "$mirror" ] || return 1
  folder=$(mktemp -d)
  mkdir -p "$folder"/lists/partial "$folder"/archives/partial
  keys=/usr/share/keyrings/debian-archive-keyring.gpg
  for suite in unstable testing; do
    echo "deb-src $([ ! -f $keys ] || echo "[signed-by=$keys]") $mirror $suite main"
  done >"$folder/sources.list"
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
    version=$(apt-cache showsrc highway | awk -v want="${release#*-}-" \
      '$1 == "Version:" && index($2, want) == 1 && !n++ { print $2 }')
    [ -n "$version" ] &&
      quietly apt-get -q source --download-only --tar-only "highway=$version"
  ) && mkdir -p "$(dirname "$archive")" && cp "$folder"/highway_*.orig.tar.gz "$archive"
  rm -rf "$folder"
  have_archive
}

get_highway() {
  local archive version
  archive=subprojects/packagecache/$(wrap_value source_filename)
  if pkg-config --exists 'libhwy >= 1.2' || have_archive ||
    [ -d "subprojects/$(wrap_value directory)" ]; then return 0; fi
  if command -v apt-get >/dev/null; then
    update_lists
    version=$(apt-cache policy libhwy-dev | sed -n 's/^ *Candidate: *//p')
    if dpkg --compare-versions "${version:-0}" ge 1.2; then install_packages libhwy-dev; return; fi
    say "Highway: Debian's package is ${version:-missing}, 1.2 is needed:" \
      "getting the source of $(wrap_value directory)"
    if fetch_highway_from_debian; then return 0; fi
    install_packages ca-certificates
  fi
  say "Highway: Meson will download $(wrap_value source_url)"
}
