/* pickle.h: Python's pickles read as data. Nothing is ever called: where a pickle would have Python call something, its
 * value is an object that says what would have been called, and with what. */
#ifndef OREPA_CORE_IO_PICKLE_H
#define OREPA_CORE_IO_PICKLE_H

#include "io/file.h"

typedef enum {
  PICKLE_NONE,
  PICKLE_BOOL,
  PICKLE_INTEGER,
  PICKLE_LONG, /* does not fit into 64 bits: bytes, little-endian, two's complement */
  PICKLE_FLOAT,
  PICKLE_TEXT,  /* str; what Python 2 wrote as str may be any bytes */
  PICKLE_BYTES, /* bytes, bytearray */
  PICKLE_TUPLE,
  PICKLE_LIST,
  PICKLE_SET,
  PICKLE_DICT,      /* items: key, value, key, value ... */
  PICKLE_GLOBAL,    /* a class or function, by module and name */
  PICKLE_OBJECT,    /* callable(arguments), then its state and what was set in it */
  PICKLE_PERSISTENT /* something outside the pickle, by its identity */
} pickle_kind;

typedef struct pickle_value pickle_value;

/* Bytes of the pickle, not ended by NUL. */
typedef struct {
  const char *bytes;
  size_t length;
} pickle_text;

typedef struct {
  pickle_value **values;
  uint32_t count, capacity;
} pickle_list;

/* Values refer to one another in any way, also in circles. */
struct pickle_value {
  pickle_kind kind;
  union {
    bool truth;
    int64_t integer;
    double number;
    pickle_text text;       /* LONG, TEXT, BYTES */
    pickle_list items;      /* TUPLE, LIST, SET, DICT */
    pickle_value *identity; /* of PERSISTENT */
    struct {
      pickle_text module, name;
    } global;
    struct {
      pickle_value *callable, *arguments, *state; /* state: NULL if there is none */
      pickle_list items;                          /* key, value ... of an object that is like a dictionary */
    } object;
  };
};

typedef struct {
  const file_reader *file;
  const char *part;           /* what of the file it is, for messages; NULL: all of it */
  const unsigned char *bytes; /* borrowed until the pickle is freed */
  size_t size;
  int64_t start; /* where the bytes begin in what messages count from */
} pickle_source;

typedef struct {
  pickle_value *value;         /* what it holds */
  size_t bytes;                /* how many bytes it took */
  pickle_list persistent;      /* all PERSISTENT values */
  struct pickle_block *blocks; /* all values */
} pickle;

/* 0, or -1 with a message, and there is nothing to free. `cut` says whether the bytes ended too early. */
int pickle_read(pickle *p, const pickle_source *source, bool *cut);
void pickle_free(pickle *p);

bool pickle_is_text(const pickle_value *v, const char *text);
bool pickle_is_global(const pickle_value *v, const char *module, const char *name);

#endif
