# Options for every target (sanitizers, floating-point contract), and `ktrt_warnings` for our own.

add_compile_options(
  # GCC fuses a*b+c by itself wherever FMA is enabled, in intrinsics too: results would then differ
  # between ISA files. A kernel that wants an FMA writes one.
  -ffp-contract=off
  # The assembler's and the debugger's tables only; without it the build path enters the binary.
  "-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=")

if(KTRT_SANITIZE)
  add_compile_options(
    "-fsanitize=${KTRT_SANITIZE}" -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options("-fsanitize=${KTRT_SANITIZE}")
endif()

add_library(ktrt_warnings INTERFACE)
target_compile_options(ktrt_warnings INTERFACE -Wall -Wextra)
if(KTRT_STRICT)
  target_compile_options(
    ktrt_warnings
    INTERFACE -Werror
              -Wpedantic
              -Wshadow
              -Wconversion
              -Wno-sign-conversion
              -Wcast-qual
              -Wnon-virtual-dtor
              -Woverloaded-virtual
              -Wextra-semi
              -Wundef)
endif()
