/* zip.h: archives whose entries are stored as they are, as torch.save writes them. */
#ifndef OREPA_CORE_IO_ZIP_H
#define OREPA_CORE_IO_ZIP_H

#include "io/file.h"

typedef struct {
  const char *name; /* the directory's; not ended by NUL */
  size_t length;
  int64_t offset, size; /* of the bytes themselves, which are known to be in the file */
  uint32_t checksum;    /* 0: not computed */
} zip_entry;

typedef struct {
  const file_reader *file;
  unsigned char *directory;
  zip_entry *entries; /* sorted by name */
  size_t count;
  const char *root; /* the folder that every entry is in, as the first entry's name has it: with its slash */
  size_t root_length;
} zip_archive;

/* Reads and checks the whole directory: 0, or -1 and nothing is left to close. */
int zip_open(zip_archive *zip, const file_reader *file);
void zip_close(zip_archive *zip);
/* The entry called `name` in the root folder; NULL: there is none. */
const zip_entry *zip_find(const zip_archive *zip, const char *name);
/* Whether an entry's name in the root folder begins with these words. */
bool zip_has(const zip_archive *zip, const char *start);

#endif
