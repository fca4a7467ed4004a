# Zig as a cross compiler; tools/wheels.py makes the programs in ZIG_BIN and passes these variables through the
# environment, since CMake reads this file again for each of its checks.
#
#   ZIG_BIN        folder with clang, clang++, ar, ranlib for one target
#   ZIG_PROCESSOR  x86_64 or aarch64
#   ZIG_RUNTIME    the shared C++ runtime (tools/zig/runtime); empty while it is built itself
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR $ENV{ZIG_PROCESSOR})
set(CMAKE_C_COMPILER $ENV{ZIG_BIN}/clang)
set(CMAKE_CXX_COMPILER $ENV{ZIG_BIN}/clang++)
set(CMAKE_ASM_COMPILER $ENV{ZIG_BIN}/clang)
set(CMAKE_AR $ENV{ZIG_BIN}/ar)
set(CMAKE_RANLIB $ENV{ZIG_BIN}/ranlib)
# strip of this machine knows its own processor alone; the linker strips
set(CMAKE_STRIP $ENV{ZIG_BIN}/strip)
if(NOT "$ENV{ZIG_RUNTIME}" STREQUAL "")
  # musl gives threads stacks of 128 KiB unless the program asks for more
  set(CMAKE_EXE_LINKER_FLAGS_INIT "-s -nostdlib++ -Wl,-z,stack-size=8388608")
  set(CMAKE_SHARED_LINKER_FLAGS_INIT "-s -nostdlib++")
  set(CMAKE_CXX_STANDARD_LIBRARIES_INIT "$ENV{ZIG_RUNTIME}")
  set(CMAKE_C_STANDARD_LIBRARIES_INIT "$ENV{ZIG_RUNTIME}")
endif()
# nothing of this machine's own libraries
set(CMAKE_FIND_ROOT_PATH $ENV{ZIG_BIN})
foreach(kind LIBRARY INCLUDE PACKAGE)
  set(CMAKE_FIND_ROOT_PATH_MODE_${kind} ONLY)
endforeach()
