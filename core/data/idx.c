/* idx.c: reads idx files, the format of MNIST, plain or compressed by gzip, from a file or from memory.
 *
 * A header may claim anything, so memory follows the bytes seen: the tensor is made once an eighth of its elements has
 * been read, and until then they go to a piece that doubles. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#define ZLIB_CONST /* zlib leaves its input alone */
#include <zlib.h>

#include "orepa_data.h"
#include "tensor/tensor.h"

/* ---- bytes: from a file or from memory, as they are or through inflate ---- */

enum { RAW_BYTES = 1 << 14 };

typedef struct {
  const char *name;  /* in messages */
  FILE *file;        /* NULL: memory, all of it at hand */
  const Bytef *next; /* raw bytes at hand */
  size_t left;
  bool gzip;
  bool between_members; /* a gzip member has ended, and no other began */
  bool cut;             /* the raw bytes ended inside a gzip member */
  uint64_t given;
  z_stream stream;
  Bytef buffer[RAW_BYTES];
} idx_source;

/* Sees to it that raw bytes are at hand: 1, 0 at their end, -1 and a message. */
static int source_refill(idx_source *s) {
  if (!s->left && s->file) {
    s->left = fread(s->buffer, 1, sizeof s->buffer, s->file);
    s->next = s->buffer;
    if (!s->left && ferror(s->file))
      return error_set("%s: reading failed: %s", s->name, strerror(errno));
  }
  return s->left > 0;
}

/* Looks at the first bytes; s is zero but for its name and where bytes come from. */
static int source_open(idx_source *s) {
  if (source_refill(s) < 0)
    return -1;
  s->gzip = s->left >= 2 && s->next[0] == 0x1f && s->next[1] == 0x8b;
  if (s->gzip && inflateInit2(&s->stream, 16 + MAX_WBITS) != Z_OK)
    return error_out_of_memory("%s: out of memory: no room for zlib's window", s->name);
  return 0;
}

static void source_close(idx_source *s) {
  if (s->gzip)
    inflateEnd(&s->stream);
}

/* What comes after a gzip member: 1 for another, which is begun, 0 for nothing, -1 and a message for anything else. */
static int next_member(idx_source *s, int more) {
  if (more <= 0)
    return more;
  if (*s->next != 0x1f)
    return error_set("%s: other bytes follow its gzip stream", s->name);
  inflateReset(&s->stream);
  s->between_members = false;
  return 1;
}

/* One step of inflate: how many bytes it gave, or -1 and a message. */
static int64_t inflate_some(idx_source *s, Bytef *into, size_t wanted) {
  const uInt most = 1u << 30;
  z_stream *z = &s->stream;
  uInt in = s->left < most ? (uInt)s->left : most, out = wanted < most ? (uInt)wanted : most;
  z->next_in = s->next, z->avail_in = in;
  z->next_out = into, z->avail_out = out;
  int status = inflate(z, Z_NO_FLUSH);
  s->next += in - z->avail_in;
  s->left -= in - z->avail_in;
  s->between_members = status == Z_STREAM_END;
  s->cut = status == Z_BUF_ERROR; /* no input, and nothing held back from earlier input */
  s->given += out - z->avail_out;
  if (status == Z_MEM_ERROR)
    return error_out_of_memory("%s: out of memory: no room for zlib's window", s->name);
  if (status != Z_OK && !s->between_members && !s->cut)
    return error_set("%s: the gzip stream is damaged: %s after %llu bytes", s->name, z->msg ? z->msg : "invalid data",
                     (unsigned long long)s->given);
  return out - z->avail_out;
}

static int64_t inflate_all(idx_source *s, Bytef *into, size_t wanted) {
  size_t got = 0;
  while (got < wanted && !s->cut) {
    int more = source_refill(s);
    if (s->between_members)
      more = next_member(s, more);
    if (more < 0)
      return -1;
    if (s->between_members)
      break;
    int64_t some = inflate_some(s, into + got, wanted - got);
    if (some < 0)
      return -1;
    got += (size_t)some;
  }
  return (int64_t)got;
}

/* Gives `wanted` bytes, or fewer at the end, or -1 and a message. */
static int64_t source_read(idx_source *s, void *into, size_t wanted) {
  if (s->gzip)
    return inflate_all(s, into, wanted);
  size_t got = 0;
  while (got < wanted) {
    int more = source_refill(s);
    if (more < 0)
      return -1;
    if (!more)
      break;
    size_t some = wanted - got < s->left ? wanted - got : s->left;
    memcpy((char *)into + got, s->next, some);
    s->next += some;
    s->left -= some;
    got += some;
  }
  return (int64_t)got;
}

static const char *cut_text(const idx_source *s) {
  return s->cut ? " (its gzip stream is cut off)" : "";
}

/* ---- the header ---- */

typedef struct {
  orepa_dtype dtype;
  int rank;
  int64_t shape[OREPA_MAX_RANK];
  int64_t bytes; /* of the elements */
} idx_header;

static const char *header_text(const idx_header *h) {
  static _Thread_local char text[200];
  snprintf(text, sizeof text, "%s %s", orepa_dtype_name(h->dtype), shape_text(h->rank, h->shape));
  return text;
}

/* What a file with these first bytes might be, for the message. */
static const char *guess_text(const Bytef magic[4]) {
  static const struct {
    char magic[4];
    int length;
    const char *text;
  } guesses[] = {
      {"<", 1, " (HTML?)"},
      {"{", 1, " (JSON?)"},
      {"PK", 2, " (ZIP?)"},
      {"\037\213", 2, " (gzip within gzip?)"},
      {"BZh", 3, " (bzip2?)"},
      {"\3757zX", 4, " (xz?)"},
      {"\050\265\057\375", 4, " (Zstandard?)"},
      {"\211PNG", 4, " (PNG?)"},
      {"vers", 4, " (a Git LFS pointer?)"},
  };
  for (size_t k = 0; k < sizeof guesses / sizeof *guesses; k++)
    if (!memcmp(magic, guesses[k].magic, (size_t)guesses[k].length))
      return guesses[k].text;
  return "";
}

static int dtype_of_code(const char *name, int code, orepa_dtype *dtype) {
  switch (code) {
  case 0x08:
    *dtype = OREPA_UINT8;
    return 0;
  case 0x0C:
    *dtype = OREPA_INT32;
    return 0;
  case 0x0D:
    *dtype = OREPA_FLOAT32;
    return 0;
  case 0x0E:
    *dtype = OREPA_FLOAT64;
    return 0;
  case 0x09:
  case 0x0B:
    return error_set(
        "%s: its elements are %s, for which there is no tensor type (uint8 int32 float32 float64 are read)", name,
        code == 0x09 ? "int8" : "int16");
  default:
    return error_set("%s: not an idx file: no type has the code %02x (08 0c 0d 0e are read)", name, code);
  }
}

/* The first four bytes: two zeros, type and rank. */
static int magic_read(idx_source *s, idx_header *h) {
  Bytef magic[4];
  int64_t got = source_read(s, magic, sizeof magic);
  if (got < 0)
    return -1;
  if (got == 0)
    return error_set("%s: not an idx file: it is empty%s", s->name, cut_text(s));
  if (got < 4)
    return error_set("%s: not an idx file: it ends after %d bytes%s", s->name, (int)got, cut_text(s));
  if (magic[0] || magic[1])
    return error_set("%s: not an idx file: it starts with %02x %02x %02x %02x%s", s->name, magic[0], magic[1], magic[2],
                     magic[3], guess_text(magic));
  h->rank = magic[3];
  if (dtype_of_code(s->name, magic[2], &h->dtype))
    return -1;
  if (h->rank < 1 || h->rank > OREPA_MAX_RANK)
    return error_set("%s: its rank is %d; ranks of 1 to %d are read", s->name, h->rank, OREPA_MAX_RANK);
  return 0;
}

static uint32_t big_endian(const Bytef b[4]) {
  return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

static int header_read(idx_source *s, idx_header *h) {
  if (magic_read(s, h))
    return -1;
  Bytef sizes[OREPA_MAX_RANK][4];
  int64_t wanted = 4 * h->rank, got = source_read(s, sizes, (size_t)wanted);
  if (got < 0)
    return -1;
  if (got < wanted)
    return error_set("%s: ends after %d of the %d bytes of its header%s", s->name, 4 + (int)got, 4 + (int)wanted,
                     cut_text(s));
  int64_t nonzero = (int64_t)orepa_dtype_size(h->dtype);
  bool empty = false, overflows = false;
  for (int d = 0; d < h->rank; d++) {
    h->shape[d] = big_endian(sizes[d]);
    empty |= h->shape[d] == 0;
    overflows |= __builtin_mul_overflow(nonzero, h->shape[d] ? h->shape[d] : 1, &nonzero);
  }
  h->bytes = empty ? 0 : nonzero;
  if (overflows)
    return error_set("%s: its header claims %s, more than can be addressed", s->name, header_text(h));
  return 0;
}

/* ---- the elements ---- */

/* 47040000 as 47,040,000. */
static const char *grouped(int64_t number, char text[32]) {
  char digits[24];
  int length = snprintf(digits, sizeof digits, "%lld", (long long)number), used = 0;
  for (int k = 0; k < length; k++) {
    if (k && (length - k) % 3 == 0)
      text[used++] = ',';
    text[used++] = digits[k];
  }
  text[used] = 0;
  return text;
}

/* Elements that have no tensor yet. */
typedef struct {
  char *bytes;
  size_t used, capacity;
} idx_piece;

static void piece_free(idx_piece *piece) {
  allocator_put(cpu_device(), piece->bytes, piece->capacity);
}

static int piece_grow(idx_piece *piece, size_t capacity) {
  char *bytes = allocator_get(cpu_device(), capacity);
  if (!bytes)
    return -1;
  if (piece->used)
    memcpy(bytes, piece->bytes, piece->used);
  piece_free(piece);
  piece->bytes = bytes;
  piece->capacity = capacity;
  return 0;
}

/* Reads on until `wanted` bytes are there, or all there are. */
static int piece_read(idx_source *s, idx_piece *piece, size_t wanted) {
  const size_t first = 1 << 16;
  while (piece->used < wanted) {
    size_t capacity = piece->capacity ? 2 * piece->capacity : first;
    if (piece_grow(piece, capacity < wanted ? capacity : wanted))
      return error_prefix("%s: ", s->name);
    int64_t got = source_read(s, piece->bytes + piece->used, piece->capacity - piece->used);
    if (got < 0)
      return -1;
    piece->used += (size_t)got;
    if (piece->used < piece->capacity)
      break;
  }
  return 0;
}

static int ends_early(const idx_source *s, const idx_header *h, size_t got) {
  char found[32], expected[32];
  return error_set("%s: ends after %s of %s bytes of elements (%s)%s", s->name, grouped((int64_t)got, found),
                   grouped(h->bytes, expected), header_text(h), cut_text(s));
}

/* Fills `t`, row-major, with the piece and all that follows. */
static int elements_into(idx_source *s, const idx_header *h, const idx_piece *piece, orepa_tensor *t) {
  device_array array;
  if (tensor_writes(t, &array))
    return error_prefix("%s: ", s->name);
  memcpy(array.data, piece->bytes, piece->used);
  size_t rest = (size_t)h->bytes - piece->used;
  int64_t got = source_read(s, (char *)array.data + piece->used, rest);
  if (got < 0)
    return -1;
  return (size_t)got < rest ? ends_early(s, h, piece->used + (size_t)got) : 0;
}

static int elements_read(idx_source *s, const idx_header *h, orepa_tensor *t) {
  const size_t bytes = (size_t)h->bytes, at_least = 1 << 16;
  size_t wanted = bytes / 8 < at_least ? at_least : bytes / 8;
  if (wanted > bytes)
    wanted = bytes;
  if (!bytes)
    return 0;
  idx_piece piece = {0};
  int failed = piece_read(s, &piece, wanted);
  if (!failed)
    failed = piece.used < wanted ? ends_early(s, h, piece.used) : elements_into(s, h, &piece, t);
  piece_free(&piece);
  return failed;
}

/* Nothing may follow. What does is counted, within reason; its reading also has the gzip stream's checksum checked. */
static int source_ends(idx_source *s, const idx_header *h) {
  enum { ENOUGH = 1 << 24 };
  char bytes[4096], found[32], expected[32];
  int64_t more = 0, got = 1;
  while (got > 0 && more < ENOUGH) {
    got = source_read(s, bytes, sizeof bytes);
    if (got < 0)
      return -1;
    more += got;
  }
  if (more)
    return error_set("%s: has %s%s bytes of elements, but its header announces %s (%s)", s->name,
                     more < ENOUGH ? "" : "more than ", grouped(h->bytes + more, found), grouped(h->bytes, expected),
                     header_text(h));
  return s->cut ? error_set("%s: its gzip stream is cut off before its checksum", s->name) : 0;
}

static void from_big_endian(void *memory, size_t size, int64_t count) {
  Bytef *b = memory;
  if (size == 4) {
    for (int64_t k = 0; k < count; k++, b += 4) {
      uint32_t value = big_endian(b);
      memcpy(b, &value, 4);
    }
  } else if (size == 8) {
    for (int64_t k = 0; k < count; k++, b += 8) {
      uint64_t value = (uint64_t)big_endian(b) << 32 | big_endian(b + 4);
      memcpy(b, &value, 8);
    }
  }
}

/* Takes t, row-major, and gives it back in the memory order of new tensors. */
static orepa_tensor *contiguous_of(orepa_tensor *t) {
  if (orepa_is_contiguous(t))
    return t;
  orepa_tensor *dense = tensor_like(t);
  if (dense && tensor_copy_into(dense, t)) {
    orepa_release(dense);
    dense = NULL;
  }
  orepa_release(t);
  return dense;
}

static orepa_tensor *tensor_read(idx_source *s) {
  idx_header h;
  if (header_read(s, &h))
    return NULL;
  orepa_tensor *t = tensor_new(h.dtype, cpu_device(), h.rank, h.shape); /* without memory yet */
  if (!t)
    return NULL;
  shape_row_major(t->rank, t->shape, t->strides);
  device_array array;
  if (elements_read(s, &h, t) || source_ends(s, &h) || tensor_writes(t, &array))
    return tensor_fail(t);
  from_big_endian(array.data, orepa_dtype_size(h.dtype), orepa_count(t));
  return contiguous_of(t);
}

static orepa_tensor *source_parse(idx_source *s) {
  if (source_open(s))
    return NULL;
  orepa_tensor *t = tensor_read(s);
  source_close(s);
  return t;
}

orepa_tensor *orepa_load_idx(const char *path) {
  idx_source s = {.name = path, .file = fopen(path, "rb")};
  if (!s.file) {
    error_set("%s: cannot be opened: %s", path, strerror(errno));
    return NULL;
  }
  orepa_tensor *t = source_parse(&s);
  fclose(s.file);
  return t;
}

orepa_tensor *orepa_parse_idx(const char *name, const void *bytes, size_t size) {
  idx_source s = {.name = name, .next = bytes, .left = size};
  return source_parse(&s);
}
