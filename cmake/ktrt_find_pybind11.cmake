# pybind11 from the build requirements (pip) or from the interpreter that is to load the module.
find_package(pybind11 3.0 CONFIG QUIET)
if(NOT pybind11_FOUND)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_cmake_dir
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "pybind11 not found for ${Python_EXECUTABLE}: pip install pybind11")
  endif()
  find_package(pybind11 3.0 CONFIG REQUIRED PATHS "${pybind11_cmake_dir}" NO_DEFAULT_PATH)
endif()
