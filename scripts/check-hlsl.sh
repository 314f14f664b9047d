#!/bin/sh
# Compiles every shader module, translated to HLSL, with Microsoft's two compilers under wine: DXC (shader
# model 6.0, 6.2 for 16-bit floats) and FXC (5.1; it has neither these nor subgroup operations). Their DLLs come with Dawn for Node.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh

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
    for file in "$target/shaders/$1"/*.hlsl; do
        printf '%s %s\n' "$file" "$(sed -n '1s/^\/\/ entry point: //p' "$file")"
    done >"$folder/$1.list"
}
list hlsl60
list hlsl51

# Side by side; each says its refusals.
"$wine" "$folder/hlsl.exe" dxc "$folder/hlsl60.list" >"$folder/dxc.log" 2>&1 &
dxc=$!
"$wine" "$folder/hlsl.exe" fxc "$folder/hlsl51.list" >"$folder/fxc.log" 2>&1 &
fxc=$!
failed=0
wait "$dxc" || failed=1
wait "$fxc" || failed=1
tr -d '\r' <"$folder/dxc.log"
tr -d '\r' <"$folder/fxc.log"
exit "$failed"
