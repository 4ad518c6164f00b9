// KVMIX_API marks what the libraries export; everything else is hidden. KVMIX_HIDDEN marks a
// private type inside an exported class, which would be exported with the class. All public headers
// include this one first, so it also says which C++ they need.
#ifndef KVMIX_EXPORT_H_
#define KVMIX_EXPORT_H_

#if defined(__cplusplus) && __cplusplus < 202002L
#error kvmix needs C++20: compile with -std=c++20
// This file is nowhere: compilers stop here, before the errors that follow from the first.
#include "kvmix/needs C++20"
#endif

#if defined(__GNUC__)
#define KVMIX_API __attribute__((visibility("default")))
#define KVMIX_HIDDEN __attribute__((visibility("hidden")))
#else
#define KVMIX_API
#define KVMIX_HIDDEN
#endif

#endif  // KVMIX_EXPORT_H_
