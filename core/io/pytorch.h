/* pytorch.h: what torch.save wrote, from the inside: storages by their keys, tensors by their names. */
#ifndef OREPA_CORE_IO_PYTORCH_H
#define OREPA_CORE_IO_PYTORCH_H

#include "io/format.h"
#include "io/pickle.h"
#include "orepa_io.h"

/* What a value is, in words: two names and a dot at most. */
enum { PYTORCH_KIND_BYTES = 2 * FORMAT_QUOTED_BYTES + 2 };

/* A run of elements in the file. */
typedef struct {
  pickle_text key;
  const struct pytorch_type *type;
  int64_t count;         /* elements */
  int64_t offset, bytes; /* in the file; bytes are at least what the elements take */
  uint32_t checksum;     /* 0: none */
  bool found;            /* offset and bytes are known */
} pytorch_storage;

/* A view of a storage, under a name. */
typedef struct {
  char *name;
  const pickle_value *value; /* two names of one value are one tensor */
  const pytorch_storage *storage;
  orepa_dtype dtype;
  int rank;
  int64_t shape[OREPA_MAX_RANK], strides[OREPA_MAX_RANK], offset; /* in elements */
  int64_t bytes;                                                  /* of its elements in logical order */
  size_t position;                                                /* among the tensors */
  orepa_tensor *loaded;
} pytorch_tensor;

typedef struct {
  const file_reader *file;
  const orepa_device *device;
  pickle object;
  pytorch_storage *storages; /* sorted by key, each once */
  size_t storage_count;
  pytorch_tensor *tensors; /* in the file's order */
  size_t tensor_count, tensor_room;
  orepa_archive *archive;
} pytorch_file;

/* ---- storages and tensors (pytorch_tensors.c) */
/* All storages that the object refers to. */
int pytorch_list_storages(pytorch_file *f);
pytorch_storage *pytorch_find_storage(const pytorch_file *f, const pickle_text *key); /* NULL: none */
int64_t pytorch_element_size(const pytorch_storage *s);
/* The tensor that a value stands for, a parameter's included: 1 and it is described; 0: it is none, or one that no
 * tensor of ours can be, and then `reason` says so; -1: it breaks a rule. */
int pytorch_describe(const pytorch_file *f, const char *name, const pickle_value *v, pytorch_tensor *t,
                     char reason[PYTORCH_KIND_BYTES]);
/* Reads the tensors that were listed, and adds them to the archive. */
int pytorch_load_tensors(pytorch_file *f);

/* ---- names (pytorch_names.c): lists tensors under their paths, and puts plain values into the archive's metadata */
int pytorch_list_names(pytorch_file *f);

/* ---- plain values (pytorch_values.c) */
typedef struct {
  char *bytes; /* ended by NUL once anything was written */
  size_t length, room;
} text_buffer;
int text_append(text_buffer *text, const char *bytes, size_t length); /* -1: out of memory, without a message */
/* Writes a value that is one line of text: numbers as JSON has them, strings as they are, lists of those as JSON. 1:
 * done; 0: it is no such value, and nothing was written; -1: out of memory, without a message; -2: a list gives more
 * than `most` bytes. */
int pytorch_write_plain(text_buffer *text, const pickle_value *v, int64_t most);
/* "argparse.Namespace" and the like: what the value is. */
void pytorch_write_kind(const pickle_value *v, char kind[PYTORCH_KIND_BYTES]);
/* A tuple or list, a torch.Size as well; NULL: something else. */
const pickle_list *pytorch_sequence(const pickle_value *v);
/* The items of a dictionary, or of an object that is like one; NULL: something else. */
const pickle_list *pytorch_dictionary(const pickle_value *v);

/* A file that is open, in either container. */
orepa_archive *pytorch_read(const file_reader *file, const orepa_device *device);
/* Whether the first bytes are those of a checkpoint: a ZIP archive or a pickle. */
bool pytorch_may_be(const file_reader *file);

#endif
