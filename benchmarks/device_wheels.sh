#!/bin/bash
# Fill .wheels/ with what `make device` needs and a machine without network may lack: the rivals of
# attention that come as Python packages. Run it where a package index is reached; the folder then
# travels with the checkout. For CPython 3.12 on Linux x86-64; others: VERSION=3.13 bash ...
set -euo pipefail
cd "$(dirname "$0")/.."
# tokamax, and what it needs beside jax, flax, numpy, protobuf and tqdm.
alone=(tokamax einshape immutabledict jaxtyping qwix tensorboardX wadler-lindig)
whole=(pydantic) # with its own needs, whose versions it chooses
platforms=()
for platform in manylinux_2_28 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${platform}_x86_64")
done
download() {
    python3 -m pip download --quiet --only-binary=:all: --implementation cp \
        --python-version "${VERSION:-3.12}" "${platforms[@]}" --dest .wheels "$@"
}
rm -rf .wheels
download --no-deps "${alone[@]}" # jax and CUDA are those of the machine
download "${whole[@]}"
du -sh .wheels
