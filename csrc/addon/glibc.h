// Binds what glibc 2.34 moved to the versions that every glibc since Node's own floor has, so that an addon linked on a
// new system loads on JetPack 5 (glibc 2.31).
#pragma once

#include <features.h>

#ifdef __GLIBC__
#if defined(__x86_64__)
#define HALFBYTE_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define HALFBYTE_GLIBC "GLIBC_2.17"
#endif
#endif

#ifdef HALFBYTE_GLIBC
__asm__(".symver dlopen, dlopen@" HALFBYTE_GLIBC);
__asm__(".symver dlsym, dlsym@" HALFBYTE_GLIBC);
__asm__(".symver dlerror, dlerror@" HALFBYTE_GLIBC);
__asm__(".symver dladdr, dladdr@" HALFBYTE_GLIBC);
__asm__(".symver pthread_create, pthread_create@" HALFBYTE_GLIBC);
__asm__(".symver pthread_join, pthread_join@" HALFBYTE_GLIBC);
#endif
