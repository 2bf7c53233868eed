/* host_memory.h: the host's memory, as the devices that live in it give it out. */
#ifndef OREPA_CORE_HOST_MEMORY_H
#define OREPA_CORE_HOST_MEMORY_H

#include <stddef.h>

/* Bytes that may still be allocated without the system, or a control group that this process is in, running out; 512
 * MiB are left alone. `root` stands before the files that are read: "", or in tests a folder with files like /proc's
 * and /sys's. */
size_t host_available(const char *root);

/* Aligned to 64 bytes, on huge pages where the system has them. NULL: there is no memory. */
void *host_allocate(size_t bytes);
void host_deallocate(void *memory, size_t bytes);
/* From which size on blocks may be given back in other pieces, of whole pages; 0: not at all. */
size_t host_divisible(void);

#endif
