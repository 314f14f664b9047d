#!/bin/sh
# Real processes through Debian's Open MPI: 1, 2, 3 and 4 ranks give the same weights, on the CPU and on the software
# adapter; a run goes on with another number of ranks, and after the death of one.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

need mpirun openmpi-bin
# What the feature is built with: the library's headers, and libclang for their bindings.
need mpicc libopenmpi-dev
[ -n "$(find /usr/lib* -name 'libclang*.so*' -print -quit 2>/dev/null)" ] || {
    command -v apt-get >/dev/null || skip "no libclang here and no apt-get to install libclang-dev"
    as_root apt-get install -y -qq --no-install-recommends libclang-dev >/dev/null ||
        skip "apt-get could not install libclang-dev"
}

timeout 30 mpirun --oversubscribe --allow-run-as-root -n 2 true >/dev/null 2>&1 ||
    skip "mpirun starts no two processes here"

# With the dependencies of the other tests; of wgrad itself no more than it takes to be fast enough.
cargo test --release --quiet --config 'profile.release.package.wgrad.opt-level=1' --features mpi --test mpi
