// Names of a struct's members, for Python, which passes arguments by name.
#pragma once

#include <tuple>

// Stands in a struct and lists those of its members that Python gives.
#define ZK_FIELDS(...)                                      \
  static const char* field_names() { return #__VA_ARGS__; } \
  auto fields() { return std::tie(__VA_ARGS__); }
