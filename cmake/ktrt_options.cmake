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

# Whoever calls a forward may have a small stack (256 KB are usual): big arrays belong in a workspace.
# A kernel may keep one block of weights there, for the L1 cache (AMX INT4: 47 KB). Sanitizers widen
# every frame, and tests may use what they like.
set(KTRT_FRAME_WARNING "")
set(KTRT_KERNEL_FRAME_WARNING "")
if(KTRT_STRICT AND NOT KTRT_SANITIZE)
  set(KTRT_FRAME_WARNING -Wframe-larger-than=16384)
  set(KTRT_KERNEL_FRAME_WARNING -Wframe-larger-than=49152)
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
