# LATENTD_STATIC: one program that needs of the system nothing but libc. The distribution's packages carry an
# archive beside each shared object, but their CMake files name the shared one; this puts the archive in
# its place.

# What find_package() looks for by itself (OpenSSL, zlib, protobuf, c-ares).
set(CMAKE_FIND_LIBRARY_SUFFIXES .a)
set(OPENSSL_USE_STATIC_LIBS ON)
set(ZLIB_USE_STATIC_LIBS ON)
set(Protobuf_USE_STATIC_LIBS ON)

# libstdc++ and libgcc belong to the compiler, not to the system that the program runs on. Archives come
# in any order: a group makes every linker look until nothing is missing.
add_link_options(-static-libstdc++ -static-libgcc)
string(REPLACE "<LINK_LIBRARIES>" "-Wl,--start-group <LINK_LIBRARIES> -Wl,--end-group"
  CMAKE_CXX_LINK_EXECUTABLE "${CMAKE_CXX_LINK_EXECUTABLE}")

# gRPC names re2 as -lre2: a folder with the archive alone comes first.
find_library(LATENTD_RE2_ARCHIVE re2 REQUIRED)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/archives)
file(CREATE_LINK ${LATENTD_RE2_ARCHIVE} ${CMAKE_BINARY_DIR}/archives/libre2.a SYMBOLIC)
add_link_options(-L${CMAKE_BINARY_DIR}/archives)

# Gives every imported shared library of this directory its archive. Call it after all find_package().
function(latentd_link_archives)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target ${targets})
    get_target_property(type ${target} TYPE)
    if(NOT type STREQUAL "SHARED_LIBRARY")
      continue()
    endif()
    foreach(config "" _NONE _RELEASE)
      get_target_property(location ${target} IMPORTED_LOCATION${config})
      if(location)
        string(REGEX REPLACE "\\.so[.0-9]*$" ".a" archive ${location})
        if(EXISTS ${archive})
          set_target_properties(${target} PROPERTIES IMPORTED_LOCATION${config} ${archive})
        endif()
      endif()
    endforeach()
  endforeach()
endfunction()
