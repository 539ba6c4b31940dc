# cmake -DNM=… -DREGEX=… -DOBJECTS=a.o;b.o -P check_isa_symbols.cmake
#
# An ISA file may export nothing but one constant table. A weak symbol (an inline function compiled
# with AVX-512, say) could be the copy that the linker keeps for the whole program, which then dies
# of an illegal instruction on a smaller machine.

set(checked 0)
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "${REGEX}")
    continue()
  endif()
  math(EXPR checked "${checked} + 1")
  execute_process(
    COMMAND "${NM}" --demangle --extern-only --defined-only "${object}"
    OUTPUT_VARIABLE symbols
    COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
  list(LENGTH symbols count)
  if(NOT count EQUAL 1 OR NOT symbols MATCHES "^[0-9a-f]+ [RD] ")
    list(JOIN symbols "\n  " symbols)
    message(SEND_ERROR "${object}\nmust define one external constant and nothing else, but has:\n"
                       "  ${symbols}")
  endif()
endforeach()
message(STATUS "${checked} ISA object files checked")
if(checked EQUAL 0)
  message(FATAL_ERROR "no ISA object file among: ${OBJECTS}")
endif()
