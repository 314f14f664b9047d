# shellcheck shell=sh
# What the checks in this folder share; they source it after `cd` to the project's root.
#
# A check ends with 0 (passed), 77 (skipped, with a line that says why) or anything else (failed).

target=${CARGO_TARGET_DIR:-target}

# The exit code of a skipped check, as in automake.
skip() {
    printf 'skipped: %s\n' "$*"
    exit 77
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

# need PROGRAM PACKAGE...: installs Debian packages unless the program is there; skips without them.
need() {
    program=$1
    shift
    command -v "$program" >/dev/null && return
    command -v apt-get >/dev/null || skip "no $program here and no apt-get to install $*"
    # Goes on after a failed update: one broken third-party source must not stop us.
    as_root apt-get update -qq || true
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
        skip "apt-get could not install $*"
}

# npm_package NAME@VERSION: puts an npm package into $target/npm; sets npm_modules to where it lies.
npm_package() {
    npm_modules=$target/npm/node_modules
    [ -f "$target/npm/$1.installed" ] && return
    need npm nodejs npm
    mkdir -p "$target/npm"
    npm install --prefix "$target/npm" --no-save --no-audit --no-fund --ignore-scripts "$1" >/dev/null ||
        skip "npm could not install $1"
    touch "$target/npm/$1.installed"
}

# dump_shaders: writes every shader module to a fresh $target/shaders.
dump_shaders() {
    rm -rf "$target/shaders"
    cargo run --release --quiet --example dump_shaders "$target/shaders"
}
