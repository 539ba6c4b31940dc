# Compiler flags by file name: csrc/kernels/*/<isa>.cc. There are no global ISA flags: everything
# else is compiled for baseline x86-64 and runs on any such machine.

set(avx2_flags -mavx2 -mfma -mf16c)
set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
set(KTRT_ISA_FLAGS_portable "")
set(KTRT_ISA_FLAGS_avx2 ${avx2_flags})
set(KTRT_ISA_FLAGS_avx_vnni ${avx2_flags} -mavxvnni)
set(KTRT_ISA_FLAGS_avx512 ${avx512_flags})
set(KTRT_ISA_FLAGS_avx512_vnni ${avx512_flags} -mavx512vnni)
set(KTRT_ISA_FLAGS_avx_vnni_evex ${avx2_flags} -mavx512vnni -mavx512vl)
set(KTRT_ISA_FLAGS_avx512_bf16 ${avx512_flags} -mavx512vnni -mavx512bf16)
# What surrounds the tiles is AVX-512.
set(KTRT_ISA_FLAGS_amx_emulated ${KTRT_ISA_FLAGS_avx512_bf16} -mavx512vbmi)
set(KTRT_ISA_FLAGS_amx ${KTRT_ISA_FLAGS_amx_emulated} -mamx-tile -mamx-bf16 -mamx-int8)
set(KTRT_ISA_NAMES portable avx2 avx_vnni avx_vnni_evex avx512 avx512_vnni avx512_bf16 amx amx_emulated)

# The names as a regular expression over object files, for the symbol test.
list(JOIN KTRT_ISA_NAMES "|" isa_alternatives)
set(KTRT_ISA_OBJECT_REGEX "/kernels/.*/(${isa_alternatives})\\.cc\\.o$")

# Kernels are -O3 in every optimised build, without LTO (inline functions must not travel between
# files of different flags) and without exceptions or RTTI (no weak symbols from the standard library).
function(ktrt_set_isa_flags)
  # GCC 12's own AVX-512 headers use undefined vectors on purpose and warn about it (bug 105593).
  set(gcc12 $<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>)
  set(quiet $<${gcc12}:-Wno-uninitialized> $<${gcc12}:-Wno-maybe-uninitialized>)
  # GCC's partial redundancy elimination moves accumulators of the register blocks to the stack: the
  # AVX-512 VNNI block of 14 rows drops from 940 to 330 GOP/s with it.
  set(no_pre $<$<CXX_COMPILER_ID:GNU>:-fno-tree-pre>)
  # Under a sanitizer the big unrolled bodies would take minutes to compile at -O3; simple register
  # allocation saves a third of the rest: 27 s instead of 40 for attention/avx512.cc under ASan.
  set(gcc $<CXX_COMPILER_ID:GNU>)
  set(optimise $<${gcc}:-fira-algorithm=priority> $<${gcc}:-fira-region=one>)
  if(NOT KTRT_SANITIZE)
    set(optimise $<$<NOT:$<CONFIG:Debug>>:-O3>)
  elseif(KTRT_SANITIZE MATCHES "undefined")
    # A check of every pointer of every unrolled load: two thirds of the time to compile
    # gemm_coded/avx512.cc (50 s). AddressSanitizer looks at the same accesses.
    list(APPEND optimise -fno-sanitize=null,alignment,pointer-overflow,object-size)
  endif()
  foreach(source IN LISTS ARGN)
    get_filename_component(isa "${source}" NAME_WE)
    if(NOT source MATCHES "/csrc/kernels/.+/" OR NOT isa IN_LIST KTRT_ISA_NAMES)
      continue()
    endif()
    set(flags ${KTRT_ISA_FLAGS_${isa}} -fno-lto -fno-exceptions -fno-rtti ${quiet} ${no_pre}
              ${optimise} ${KTRT_KERNEL_FRAME_WARNING})
    set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${flags}")
  endforeach()
endfunction()
