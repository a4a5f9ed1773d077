#!/usr/bin/env bash
# Runs the built package on an emulated arm64 machine: the golden vectors pass, and every case of the list gives the bits that
# it gives here. scripts/arm64-node.sh says what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
arm() { scripts/arm64-node.sh "$@"; }

echo "running on $(arm -p 'process.arch + ", Node " + process.version')"
arm dist/cli/main.js golden check test/golden/data
npx tsc -p tsconfig.record.json
node build/test/record.js 2 >build/arm64/here.txt
arm build/test/record.js 2 >build/arm64/there.txt
diff build/arm64/here.txt build/arm64/there.txt
echo "$(wc -l <build/arm64/here.txt) cases, the same bits on arm64 and on $(uname -m)"
