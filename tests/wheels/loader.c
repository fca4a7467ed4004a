/* loader.c: opens libraries of a folder as Python on Windows does, and tells which kernels libllama takes: loader
 * FOLDER.
 *
 * The folder is not the program's own.  First as llama_cpp does it: ctypes with winmode=0, the folder in PATH; or,
 * where a second argument is given, as ctypes does it by itself.
 */
#include <windows.h>

#include <stdio.h>

typedef const char *(*variant_fn)(const char **problem);

static HMODULE open_in(const wchar_t *folder, const wchar_t *name, DWORD how) {
    wchar_t path[1024];
    swprintf(path, 1024, L"%ls\\%ls", folder, name);
    HMODULE library = LoadLibraryExW(path, NULL, how);
    if (!library) {
        fprintf(stderr, "%ls: error %lu\n", path, GetLastError());
        ExitProcess(1);
    }
    return library;
}

int main(int argc, char **argv) {
    wchar_t folder[1024], path[8192];
    if (argc < 2 || !MultiByteToWideChar(CP_UTF8, 0, argv[1], -1, folder, 1024)) {
        return 2;
    }
    if (argc == 2) {
        swprintf(path, 8192, L"%ls;", folder);
        GetEnvironmentVariableW(L"PATH", path + wcslen(path), 8192 - (DWORD)wcslen(path));
        SetEnvironmentVariableW(L"PATH", path);
    }
    const DWORD how = argc == 2 ? 0 : LOAD_LIBRARY_SEARCH_DEFAULT_DIRS | LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR;
    HMODULE llama = open_in(folder, L"llama.dll", how), ggml = open_in(folder, L"ggml.dll", how);
    open_in(folder, L"mtmd.dll", how);
    if (!GetProcAddress(llama, "llama_decode") || !GetProcAddress(llama, "xquant_llama_get_info")) {
        return 3;
    }
    const char *problem = NULL;
    variant_fn variant = (variant_fn)(void *)GetProcAddress(ggml, "xquant_llama_cpu_variant");
    const char *name = variant ? variant(&problem) : NULL;
    puts(name ? name : problem ? problem : "no function");
    return name ? 0 : 4;
}
