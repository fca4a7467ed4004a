# Zig as a cross compiler; tools/wheels.py makes the programs in ZIG_BIN and passes these variables through the
# environment, since CMake reads this file again for each of its checks.
#
#   ZIG_BIN        folder with clang, clang++ and the like for one target
#   ZIG_SYSTEM     Linux, Windows or Darwin
#   ZIG_PROCESSOR  x86_64 or aarch64
#   ZIG_RUNTIME    the shared C++ runtime (tools/zig/runtime); empty while it is built itself, and on Windows
set(CMAKE_SYSTEM_NAME $ENV{ZIG_SYSTEM})
set(CMAKE_SYSTEM_PROCESSOR $ENV{ZIG_PROCESSOR})
set(CMAKE_C_COMPILER $ENV{ZIG_BIN}/clang)
set(CMAKE_CXX_COMPILER $ENV{ZIG_BIN}/clang++)
set(CMAKE_ASM_COMPILER $ENV{ZIG_BIN}/clang)
set(CMAKE_RC_COMPILER $ENV{ZIG_BIN}/rc)
set(CMAKE_AR $ENV{ZIG_BIN}/ar)
set(CMAKE_RANLIB $ENV{ZIG_BIN}/ranlib)
# strip of this machine knows its own processor alone; the linker strips
set(CMAKE_STRIP $ENV{ZIG_BIN}/strip)
set(CMAKE_INSTALL_NAME_TOOL $ENV{ZIG_BIN}/install_name_tool)
if(NOT "$ENV{ZIG_RUNTIME}" STREQUAL "")
  set(CMAKE_EXE_LINKER_FLAGS_INIT "-s -nostdlib++")
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # musl gives threads stacks of 128 KiB unless the program asks for more
    string(APPEND CMAKE_EXE_LINKER_FLAGS_INIT " -Wl,-z,stack-size=8388608")
  endif()
  set(CMAKE_SHARED_LINKER_FLAGS_INIT "-s -nostdlib++")
  set(CMAKE_CXX_STANDARD_LIBRARIES_INIT "$ENV{ZIG_RUNTIME}")
  set(CMAKE_C_STANDARD_LIBRARIES_INIT "$ENV{ZIG_RUNTIME}")
elseif(CMAKE_SYSTEM_NAME STREQUAL "Windows")
  set(CMAKE_EXE_LINKER_FLAGS_INIT -s)
  set(CMAKE_SHARED_LINKER_FLAGS_INIT -s)
endif()
if(CMAKE_SYSTEM_NAME STREQUAL "Windows")
  # MinGW's linkers export all names of a library by themselves, Zig's those of the C runtime in it as well; so CMake
  # lists the names, as it does for Microsoft's linker
  set(CMAKE_SUPPORT_WINDOWS_EXPORT_ALL_SYMBOLS ON)
  set(CMAKE_WINDOWS_EXPORT_ALL_SYMBOLS ON)
endif()
# nothing of this machine's own libraries
set(CMAKE_FIND_ROOT_PATH $ENV{ZIG_BIN})
foreach(kind LIBRARY INCLUDE PACKAGE)
  set(CMAKE_FIND_ROOT_PATH_MODE_${kind} ONLY)
endforeach()
