#!/bin/sh
# Compiles every shader module, translated to HLSL, with Microsoft's two compilers under wine: DXC (shader
# model 6.0, 6.2 for 16-bit floats) and FXC (5.1; it has neither these nor subgroup operations); but for modules that
# hold no new line, but for numbers. Their DLLs come with Dawn for Node.
#
#     sh scripts/check-hlsl.sh [files]      files: but for modules that are not new as a whole, five times as many
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

what=${1:-lines}
npm_package webgpu 0.6.2
need x86_64-w64-mingw32-g++ g++-mingw-w64-x86-64
if ! command -v wine64 >/dev/null && [ ! -x /usr/lib/wine/wine64 ]; then
    need wine64 wine64
fi
wine=$(command -v wine64 || echo /usr/lib/wine/wine64)
dump_shaders

folder=$target/hlsl
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cp "$npm_modules"/webgpu/dist/win32-x64/*.dll "$folder"
x86_64-w64-mingw32-g++ -O1 -static -w -o "$folder/hlsl.exe" scripts/hlsl.cpp
# A prefix of our own, without the parts that ask for a download; Microsoft's FXC, not wine's.
export WINEPREFIX="$folder/wine" WINEDEBUG=-all WINEDLLOVERRIDES="mscoree=;mshtml=;d3dcompiler_47=n"
"$wine" wineboot --init >/dev/null 2>&1 || skip "wine does not start here"

# "FILE ENTRY" of every translation in a folder.
list() {
    awk 'FNR == 1 { print FILENAME, $4 }' "$target/shaders/$1"/*.hlsl >"$folder/$1.list"
}
list hlsl60
list hlsl51

# Two workers, each with half of what either compiler has to do; they say what was refused.
half() {
    ok=0
    "$wine" "$folder/hlsl.exe" fxc "$folder/hlsl51.list" "$what" "$1" 2 || ok=1
    "$wine" "$folder/hlsl.exe" dxc "$folder/hlsl60.list" "$what" "$1" 2 || ok=1
    return "$ok"
}
half 0 >"$folder/0.log" 2>&1 &
first=$!
half 1 >"$folder/1.log" 2>&1 &
second=$!
failed=0
wait "$first" || failed=1
wait "$second" || failed=1
cat "$folder/0.log" "$folder/1.log" | tr -d '\r'
exit "$failed"
