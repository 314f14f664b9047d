#!/bin/sh
# Runs the whole test suite: sh scripts/test.sh [arguments of cargo test]
#
# The tests drive a GPU. Where a Linux machine has no usable Vulkan adapter, Mesa's software adapter
# (lavapipe) is installed first, through apt-get, dnf or pacman. macOS and Windows bring an adapter.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'test.sh: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "not root and no sudo here; run as root: $*"
    fi
}

install_software_adapter() {
    if command -v apt-get >/dev/null; then
        say "no Vulkan adapter found: installing the software adapter (apt-get install libvulkan1 mesa-vulkan-drivers)"
        # Goes on after a failed update: one broken third-party source must not stop us.
        as_root sh -c 'apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libvulkan1 mesa-vulkan-drivers'
    elif command -v dnf >/dev/null; then
        say "no Vulkan adapter found: installing the software adapter (dnf install vulkan-loader mesa-vulkan-drivers)"
        as_root dnf install -y -q vulkan-loader mesa-vulkan-drivers
    elif command -v pacman >/dev/null; then
        say "no Vulkan adapter found: installing the software adapter (pacman -S vulkan-icd-loader vulkan-swrast)"
        as_root pacman -Sy --needed --noconfirm vulkan-icd-loader vulkan-swrast
    else
        fail "no Vulkan adapter and none of apt-get, dnf, pacman; install the Vulkan loader and Mesa's lavapipe driver, then run this again"
    fi
}

# Whether an adapter is usable. The program comes from the build of the tests: `cargo run` would build
# wgpu again, without the features that only the tests turn on.
has_adapter() {
    program=${CARGO_TARGET_DIR:-target}/release/wgrad
    if [ -x "$program" ]; then
        "$program" devices
    else
        cargo run --release --quiet -- devices
    fi
}

command -v cargo >/dev/null || fail "cargo not found; install Rust from https://rustup.rs, then run this again"

cargo test --release --no-run

if [ "$(uname -s)" = Linux ] && ! has_adapter >/dev/null 2>&1; then
    install_software_adapter || fail "the installation failed (see above); install a Vulkan driver by hand, then run this again"
    has_adapter >/dev/null ||
        fail "still no Vulkan adapter; if VK_DRIVER_FILES or VK_ICD_FILENAMES is set, unset it, else install a Vulkan driver by hand"
fi

exec cargo test --release --no-fail-fast "$@"
