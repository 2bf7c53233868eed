/* fuzz_idx.c: libFuzzer's entry to the reader of idx files. Whatever the bytes are, they give a tensor whose elements
 * can be read, or a message; and the same bytes compressed give the same, which takes the fuzzer past gzip's checksum.
 *
 * Built by clang with -fsanitize=fuzzer,address,undefined; seeds/idx holds files of every type, and broken ones. */
#include <zlib.h>

#include "fuzz.h"
#include "orepa_data.h"

/* All elements in logical order, one byte more than there are. NULL where the bytes are no idx file. */
static unsigned char *parsed(const char *name, const void *bytes, size_t size, size_t *length) {
  orepa_tensor *t = orepa_parse_idx(name, bytes, size);
  if (!t) {
    require(strncmp(orepa_error(), name, strlen(name)) == 0);
    return NULL;
  }
  *length = (size_t)orepa_count(t) * orepa_dtype_size(orepa_tensor_dtype(t));
  unsigned char *elements = elements_of(t);
  orepa_release(t);
  return elements;
}

static unsigned char *compress_bytes(const uint8_t *bytes, size_t size, size_t *length) {
  z_stream z = {0};
  require(deflateInit2(&z, 1, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  uLong bound = deflateBound(&z, size);
  unsigned char *packed = malloc(bound);
  require(packed != NULL);
  z.next_in = (Bytef *)bytes, z.avail_in = (uInt)size;
  z.next_out = packed, z.avail_out = (uInt)bound;
  require(deflate(&z, Z_FINISH) == Z_STREAM_END);
  *length = bound - z.avail_out;
  deflateEnd(&z);
  return packed;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  size_t plain_length = 0, packed_length = 0, packed_size;
  unsigned char *plain = parsed("plain", bytes, size, &plain_length);
  if (size < 2 || bytes[0] != 0x1f || bytes[1] != 0x8b) {
    unsigned char *packed = compress_bytes(bytes, size, &packed_size);
    unsigned char *elements = parsed("packed", packed, packed_size, &packed_length);
    require(!plain == !elements && plain_length == packed_length);
    require(!plain || !memcmp(plain, elements, plain_length));
    free(elements);
    free(packed);
  }
  free(plain);
  return 0;
}
