# How latentd's own code is compiled, and the functions that declare its targets.

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# Line tables make a crash report readable and cost no speed.
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -g1")

# Paths relative to the checkout: another clone of it finds the same objects.
find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER
    ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()
find_program(MOLD mold)
if(MOLD)
  add_link_options(-fuse-ld=mold)
  if(LATENTD_SANITIZE)
    # mold 1.10 makes a program that cannot be loaded ("cannot apply additional memory protection") of one whose
    # thread-local data is a byte and comes first among what RELRO protects.
    add_link_options(-Wl,-z,norelro)
  endif()
endif()

# Everything of ours carries these; third-party headers are SYSTEM and stay silent.
add_library(latentd_options INTERFACE)
target_compile_options(latentd_options INTERFACE
  "$<$<COMPILE_LANGUAGE:C,CXX>:-Wall;-Wextra;-Werror>" "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall;-Werror=all-warnings>")
target_include_directories(latentd_options INTERFACE ${CMAKE_SOURCE_DIR})

set(LATENTD_TIMEOUT_FACTOR 1)
if(LATENTD_SANITIZE STREQUAL "address")
  set(LATENTD_SANITIZE_FLAGS -fsanitize=address,undefined -fno-sanitize-recover=undefined)
elseif(LATENTD_SANITIZE STREQUAL "thread")
  set(LATENTD_SANITIZE_FLAGS -fsanitize=thread)
elseif(LATENTD_SANITIZE)
  message(FATAL_ERROR "LATENTD_SANITIZE is '${LATENTD_SANITIZE}'; known are: address, thread")
endif()
if(LATENTD_SANITIZE)
  set(LATENTD_TIMEOUT_FACTOR 6)
  # -O1 compiles faster and keeps the stacks honest.
  target_compile_options(latentd_options INTERFACE ${LATENTD_SANITIZE_FLAGS} -O1 -fno-omit-frame-pointer)
  target_link_options(latentd_options INTERFACE ${LATENTD_SANITIZE_FLAGS})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC guesses wrongly once its own instrumentation is in the code, and ThreadSanitizer knows no fences.
    target_compile_options(latentd_options INTERFACE -Wno-maybe-uninitialized -Wno-tsan)
  endif()
endif()
if(LATENTD_SANITIZE STREQUAL "thread")
  # For every program: without it each lock of absl's looks like a race.
  add_library(latentd_tsan OBJECT ${CMAKE_SOURCE_DIR}/tests/tsan_absl.cc)
  target_link_libraries(latentd_tsan PUBLIC absl::synchronization absl::time PRIVATE latentd_options)
else()
  add_library(latentd_tsan INTERFACE)
endif()
if(LATENTD_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "LATENTD_FUZZ needs clang: -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++")
  endif()
  target_compile_options(latentd_options INTERFACE -fsanitize=fuzzer-no-link)
  add_custom_target(latentd_fuzz_targets)
endif()

# latentd_library(NAME SRCS a.cc ... [DEPS public ...] [PRIVATE_DEPS ...])
# A folder's static library, or an INTERFACE library when it has no sources.
function(latentd_library NAME)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS;PRIVATE_DEPS" ${ARGN})
  if(ARG_SRCS)
    add_library(${NAME} STATIC ${ARG_SRCS})
    target_link_libraries(${NAME} PUBLIC ${ARG_DEPS} PRIVATE latentd_options ${ARG_PRIVATE_DEPS})
    target_include_directories(${NAME} PUBLIC ${CMAKE_SOURCE_DIR})
  else()
    add_library(${NAME} INTERFACE)
    target_link_libraries(${NAME} INTERFACE ${ARG_DEPS})
    target_include_directories(${NAME} INTERFACE ${CMAKE_SOURCE_DIR})
  endif()
endfunction()

# latentd_test(NAME SRCS a_test.cc ... DEPS ... [LABELS unit|property|golden|speed ...] [TIMEOUT s] [ENV A=b ...])
# A GoogleTest program, one ctest entry. Run from the source root, so that data is found by relative path.
# `golden` and `speed` do not run under sanitizers.
function(latentd_test NAME)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SRCS;DEPS;LABELS;ENV" ${ARGN})
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * ${LATENTD_TIMEOUT_FACTOR}")
  add_executable(${NAME} ${ARG_SRCS})
  target_link_libraries(${NAME} PRIVATE latentd_options latentd_tsan ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  add_test(NAME ${NAME} COMMAND ${NAME} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${NAME} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT} ENVIRONMENT "${ARG_ENV}")
endfunction()

# latentd_benchmark(NAME SRCS ... DEPS ...): a program on google-benchmark; built by default, run by hand.
function(latentd_benchmark NAME)
  if(NOT LATENTD_BENCHMARKS)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${NAME} ${ARG_SRCS})
  target_link_libraries(${NAME} PRIVATE latentd_options ${ARG_DEPS} benchmark::benchmark)
endfunction()

# latentd_fuzz(NAME SRCS ... DEPS ... [SEEDS folder ...]): a libFuzzer program when LATENTD_FUZZ is on, and a test that
# runs it for LATENTD_FUZZ_SECONDS. SEEDS are folders of example inputs, relative to the source root; what the fuzzer finds
# goes into the build folder.
function(latentd_fuzz NAME)
  if(NOT LATENTD_FUZZ)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS;SEEDS" ${ARGN})
  add_executable(${NAME} ${ARG_SRCS})
  target_link_options(${NAME} PRIVATE -fsanitize=fuzzer)
  target_link_libraries(${NAME} PRIVATE latentd_options ${ARG_DEPS})
  add_dependencies(latentd_fuzz_targets ${NAME})
  set(corpus ${CMAKE_BINARY_DIR}/corpus/${NAME})
  file(MAKE_DIRECTORY ${corpus})
  add_test(NAME ${NAME}
    COMMAND ${NAME} -max_total_time=${LATENTD_FUZZ_SECONDS} -timeout=10 -rss_limit_mb=4096 -print_final_stats=1
            -artifact_prefix=${corpus}/ ${corpus} ${ARG_SEEDS}
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  math(EXPR timeout "${LATENTD_FUZZ_SECONDS} * 2 + 120")
  set_tests_properties(${NAME} PROPERTIES LABELS fuzz TIMEOUT ${timeout})
endfunction()
