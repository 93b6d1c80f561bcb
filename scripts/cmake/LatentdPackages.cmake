# Every third-party package of the C++ code. Nothing is vendored: apt, or the Python environment that
# scripts/setup makes (google/rpc/*.proto), or crates.io (server/text).

if(LATENTD_STATIC)
  include(LatentdStatic)
endif()

find_package(Threads REQUIRED)
find_package(absl REQUIRED)
find_package(spdlog REQUIRED)
find_package(nlohmann_json 3.11 REQUIRED)
find_package(Protobuf REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)  # SHA-256 of the prefix cache
find_package(gRPC CONFIG REQUIRED)
find_package(yaml-cpp REQUIRED)
find_package(SQLite3 3.35 REQUIRED)  # RETURNING
find_package(CLI11 REQUIRED)
if(LATENTD_TESTS)
  find_package(GTest REQUIRED)
  find_package(benchmark REQUIRED)
endif()

# spdlog with its fmt. Neither has an archive; a static program compiles them in from their headers.
add_library(latentd_spdlog INTERFACE)
if(LATENTD_STATIC)
  target_compile_definitions(latentd_spdlog INTERFACE SPDLOG_FMT_EXTERNAL FMT_HEADER_ONLY=1)
  target_link_libraries(latentd_spdlog INTERFACE Threads::Threads)
  latentd_link_archives()
else()
  target_link_libraries(latentd_spdlog INTERFACE spdlog::spdlog)
endif()
