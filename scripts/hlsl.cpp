// hlsl.exe dxc|fxc LIST lines|files PART PARTS: compiles each "FILE ENTRY" of LIST with Microsoft's DLL beside the
// program, with the flags that wgpu gives it, but for those that hold nothing new but numbers (the shapes of layers):
// no file whose every line stood in one before, or none that stood before as a whole. Of what is left it takes one of
// so many parts. Prints every refusal and exits with 1 if there was one.
//
// Built with mingw-w64 and run under wine. DXC's interfaces are declared here, up to the last method that is
// called, because Debian 12's mingw-w64 has no dxcapi.h.

#include <windows.h>

#include <d3dcompiler.h>

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <string>

static const GUID CompilerClass = {0x73e22d93, 0xe6ce, 0x47f3, {0xb5, 0xbf, 0xf0, 0x66, 0x4f, 0x39, 0xc1, 0xb0}};
static const GUID CompilerId = {0x228b4687, 0x5a6a, 0x4730, {0x90, 0x0c, 0x97, 0x02, 0xb2, 0x20, 0x3f, 0x54}};
static const GUID ResultId = {0x58346cda, 0xdde7, 0x4497, {0x94, 0x61, 0x6f, 0x87, 0xaf, 0x5e, 0x06, 0x59}};

struct DxcBuffer {
    const void *text;
    SIZE_T size;
    UINT encoding;
};

struct DxcBlob : IUnknown {
    virtual void *STDMETHODCALLTYPE GetBufferPointer() = 0;
    virtual SIZE_T STDMETHODCALLTYPE GetBufferSize() = 0;
};

struct DxcResult : IUnknown {
    virtual HRESULT STDMETHODCALLTYPE GetStatus(HRESULT *) = 0;
    virtual HRESULT STDMETHODCALLTYPE GetResult(DxcBlob **) = 0;
    virtual HRESULT STDMETHODCALLTYPE GetErrorBuffer(DxcBlob **) = 0;
};

struct DxcCompiler : IUnknown {
    virtual HRESULT STDMETHODCALLTYPE Compile(const DxcBuffer *, LPCWSTR *arguments, UINT32 count, IUnknown *includes,
                                              REFIID, void **result) = 0;
};

static std::string describe(HRESULT status) {
    char text[32];
    snprintf(text, sizeof text, "HRESULT %08lx", status);
    return text;
}

// What a compiler wrote about the source it refused.
template <class Blob> static std::string take(Blob *errors, HRESULT status) {
    if (!errors) return describe(status);
    std::string text((char *)errors->GetBufferPointer(), errors->GetBufferSize());
    errors->Release();
    return text.empty() ? describe(status) : text.c_str();
}

// Both return the compiler's complaint, or nothing.
static std::string compile(DxcCompiler *dxc, const std::string &text, const std::string &entry) {
    std::wstring name(entry.begin(), entry.end());
    // Where there are 16-bit floats, as wgpu compiles them.
    bool halves = text.find("half") != std::string::npos;
    LPCWSTR arguments[] = {L"-E", name.c_str(), L"-T", halves ? L"cs_6_2" : L"cs_6_0", L"-HV", L"2018", L"-no-warnings",
                           L"-Ges", halves ? L"-enable-16bit-types" : L"-Ges"};
    DxcBuffer source = {text.data(), text.size(), CP_UTF8};
    DxcResult *result = nullptr;
    HRESULT status = dxc->Compile(&source, arguments, sizeof arguments / sizeof *arguments, nullptr, ResultId,
                                  (void **)&result);
    if (FAILED(status)) return describe(status);
    std::string complaint;
    DxcBlob *errors = nullptr;
    result->GetStatus(&status);
    if (FAILED(status)) {
        result->GetErrorBuffer(&errors);
        complaint = take(errors, status);
    }
    result->Release();
    return complaint;
}

static std::string compile(pD3DCompile fxc, const std::string &text, const std::string &entry) {
    ID3DBlob *code = nullptr, *errors = nullptr;
    HRESULT status = fxc(text.data(), text.size(), nullptr, nullptr, nullptr, entry.c_str(), "cs_5_1",
                         D3DCOMPILE_ENABLE_STRICTNESS, 0, &code, &errors);
    if (FAILED(status)) return take(errors, status);
    if (errors) errors->Release();
    code->Release();
    return "";
}

// The text without its numbers, those in naga's names of values (`_e12`, `local_3`) included, those of types
// (`float4`) not.
static std::string structure(const std::string &text) {
    std::string kept;
    bool word = false, number = false;
    for (unsigned char c : text) {
        bool part = isalnum(c) || c == '_' || c == '.';
        if (part && !word) number = isdigit(c);
        if (c == '_') number = true;
        word = part;
        if (!word || !number || !isdigit(c)) kept += c;
    }
    return kept;
}

// Whether some of the pieces between such separators were not there before.
static bool is_new(const std::string &text, char separator, std::set<std::string> &seen) {
    std::istringstream pieces(text);
    bool any = false;
    for (std::string piece; std::getline(pieces, piece, separator);) any |= seen.insert(piece).second;
    return any;
}

int main(int, char **arguments) {
    bool is_dxc = std::string(arguments[1]) == "dxc";
    const char *dll = is_dxc ? "dxcompiler.dll" : "d3dcompiler_47.dll";
    HMODULE library = LoadLibraryA(dll);
    DxcCompiler *dxc = nullptr;
    pD3DCompile fxc = nullptr;
    if (library && is_dxc) {
        auto create = (HRESULT(WINAPI *)(REFCLSID, REFIID, void **))(void *)GetProcAddress(library, "DxcCreateInstance");
        if (create) create(CompilerClass, CompilerId, (void **)&dxc);
    } else if (library) {
        fxc = (pD3DCompile)(void *)GetProcAddress(library, "D3DCompile");
    }
    if (!dxc && !fxc) {
        printf("%s could not be loaded\n", dll);
        return 2;
    }
    char separator = std::string(arguments[3]) == "lines" ? '\n' : 0;
    size_t part = atoi(arguments[4]), parts = atoi(arguments[5]), chosen = 0;
    int count = 0, refused = 0, alike = 0;
    std::set<std::string> seen;
    std::ifstream list(arguments[2]);
    for (std::string line; std::getline(list, line);) {
        std::istringstream words(line);
        std::string file, entry;
        words >> file >> entry;
        std::ifstream in(file, std::ios::binary);
        std::string text((std::istreambuf_iterator<char>(in)), {});
        if (!text.empty() && !is_new(structure(text), separator, seen)) {
            alike++;
            continue;
        }
        if (chosen++ % parts != part) continue;
        std::string complaint = text.empty() ? "no such file" : dxc ? compile(dxc, text, entry) : compile(fxc, text, entry);
        count++;
        if (!complaint.empty()) {
            refused++;
            printf("%s: %s\n", file.c_str(), complaint.substr(0, 1000).c_str());
        }
    }
    printf("%s, part %d of %d: %d compiled, %d refused; %d hold nothing new but numbers\n", arguments[1], (int)part + 1,
           (int)parts, count - refused, refused, alike);
    return count == 0 || refused != 0;
}
