// KVMIX_API marks what libkvmix.so exports; everything else is hidden.
#ifndef KVMIX_EXPORT_H_
#define KVMIX_EXPORT_H_

#if defined(__GNUC__)
#define KVMIX_API __attribute__((visibility("default")))
#else
#define KVMIX_API
#endif

#endif  // KVMIX_EXPORT_H_
