#!/usr/bin/env bash
# Quantizes SmolLM2 by the command, from the GGUF and from a Hugging Face folder, in every type, and asks transformers +
# bitsandbytes what they think of the results; then multiplies with every linear layer and compares errors with bitsandbytes'.
# Makes its own Python environment in build/interop.
# Usage: test/interop/run.sh [COUNTS.json]      HALFBYTE_PYTHON names a Python that has everything already.
set -euo pipefail
counts=$(realpath -m "${1:-build/interop/counts.json}")
cd "$(dirname "$0")/../.."
work=build/interop
mkdir -p "$work"

python=${HALFBYTE_PYTHON:-$work/venv/bin/python}
if [ -z "${HALFBYTE_PYTHON:-}" ] && ! cmp -s test/interop/requirements.txt "$work/installed.txt"; then
  python3 -m venv "$work/venv"
  # torch first and alone: a later resolution must not replace its CPU build.
  "$python" -m pip install --quiet "$(grep ^torch== test/interop/requirements.txt)"
  "$python" -m pip install --quiet -r test/interop/requirements.txt
  cp test/interop/requirements.txt "$work/installed.txt"
fi

gguf=$(node --input-type=module -e 'import { fetchModel } from "./scripts/fetch-model.mjs"; console.log(await fetchModel("models"));' | tail -n 1)
[ -e "$work/hf/model.safetensors" ] || "$python" test/interop/reference.py "$gguf" "$work/hf"

# Both side by side, for the format tests (HALFBYTE_TEST_MODEL).
mkdir -p "$work/model"
ln -sfn "$(realpath "$gguf")" "$work/model/$(basename "$gguf")"
ln -sfn "$(realpath "$work/hf")" "$work/model/hf"

outputs=()
for source in "$gguf" "$work/hf"; do
  route=$([ -d "$source" ] && echo hf || echo gguf)
  for type in "nf4" "nf4 --double-quant" "fp4" "int8"; do
    out=$work/out/$route-${type// --/-}
    # shellcheck disable=SC2086 — the type carries its option
    node dist/cli/main.js quantize "$source" "$out" --type $type --force --json >"$work/quantize.json"
    outputs+=("$out")
  done
done
rm -f "$counts"
status=0
"$python" test/interop/check.py --counts "$counts" "$work/hf" "${outputs[@]}" || status=1

node test/interop/products.mjs "$gguf" "$work/products"
"$python" test/interop/check_products.py --expect 210 --counts "$counts" --json "$work/products.json" "$work/products" || status=1
exit $status
