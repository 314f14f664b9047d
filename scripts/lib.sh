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

# npm_package NAME VERSION: puts an npm package into a folder of its own under $target/npm; sets
# npm_modules to the folder that NODE_PATH wants.
npm_package() {
    npm_folder=$target/npm/$1-$2
    if [ ! -f "$npm_folder/complete" ]; then
        need npm nodejs npm
        mkdir -p "$npm_folder"
        # Without scripts: what is needed of these packages is in them.
        npm install --prefix "$npm_folder" --no-save --no-audit --no-fund --ignore-scripts "$1@$2" >/dev/null ||
            skip "npm could not install $1 $2"
        touch "$npm_folder/complete"
    fi
    npm_modules=$(cd "$npm_folder/node_modules" && pwd)
}

# python_packages NAME PACKAGE...: a virtual environment $target/python/NAME with packages of PyPI; sets python to
# its interpreter.
python_packages() {
    python_folder=$target/python/$1
    shift
    if [ ! -f "$python_folder/complete" ]; then
        need python3 python3 python3-venv
        rm -rf "$python_folder"
        python3 -m venv "$python_folder" 2>/dev/null || {
            # Debian's python3 is without it.
            as_root apt-get install -y -qq --no-install-recommends python3-venv >/dev/null &&
                python3 -m venv "$python_folder" || skip "python3 could not make a virtual environment"
        }
        "$python_folder/bin/pip" install --quiet --disable-pip-version-check "$@" ||
            skip "pip could not install $*"
        touch "$python_folder/complete"
    fi
    # shellcheck disable=SC2034
    python=$python_folder/bin/python
}

# dump_shaders: writes every shader module to a fresh $target/shaders.
dump_shaders() {
    rm -rf "$target/shaders"
    cargo run --release --quiet --example dump_shaders "$target/shaders"
}
