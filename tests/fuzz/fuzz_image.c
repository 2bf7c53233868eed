/* fuzz_image.c: libFuzzer's entry to the decoders of pictures and the encoder of PNG. Whatever the bytes are, they give
 * a picture or a message, within the limit of memory, and leave nothing behind; and a picture that is written as PNG
 * comes back the same. Each PNG is also tried with its checksums made right, which takes the fuzzer past them.
 *
 * Built by clang with -fsanitize=fuzzer,address,undefined; seeds/image holds files of every kind, and broken ones. */
#include <zlib.h>

#include "fuzz.h"
#include "orepa_image.h"

static void check_round_trip(orepa_tensor *t) {
  const orepa_image_encoding png = {.format = OREPA_IMAGE_PNG, .compression = 1};
  const orepa_image_options same = {.channels = (int)orepa_shape(t)[0]};
  void *bytes;
  size_t size;
  if (orepa_encode_image(t, &png, &bytes, &size)) {
    require(orepa_error_is_out_of_memory());
    return;
  }
  orepa_tensor *again = orepa_decode_image("again", bytes, size, &same);
  free(bytes);
  require(again || orepa_error_is_out_of_memory());
  if (!again)
    return;
  require(!memcmp(orepa_shape(t), orepa_shape(again), 3 * sizeof(int64_t)));
  unsigned char *x = elements_of(t), *y = elements_of(again);
  require(!memcmp(x, y, (size_t)orepa_count(t)));
  free(x);
  free(y);
  orepa_release(again);
}

static void decode(const uint8_t *bytes, size_t size, const orepa_image_options *options, bool again) {
  size_t live = orepa_memory(cpu()).live;
  orepa_tensor *t = orepa_decode_image("input", bytes, size, options);
  if (!t)
    check_message("input");
  else {
    require(orepa_rank(t) == 3 && orepa_count(t) > 0);
    require(!options->channels || orepa_shape(t)[0] == options->channels);
    if (again)
      check_round_trip(t);
  }
  orepa_release(t);
  require(orepa_memory(cpu()).live == live);
}

static void decode_all_ways(const uint8_t *bytes, size_t size) {
  decode(bytes, size, &(orepa_image_options){0}, true);
  decode(bytes, size, &(orepa_image_options){.channels = 4, .as_float = true}, false);
  decode(bytes, size, &(orepa_image_options){.channels = 1, .as_stored = true, .at_least = {5, 5}}, true);
  decode(bytes, size, &(orepa_image_options){.indices = true}, false);
}

static uint32_t big_endian(const uint8_t *b) {
  return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

/* Chunks are length, type, data, checksum of the two before. */
static void decode_mended(const uint8_t *bytes, size_t size) {
  enum { SIGNATURE = 8, AROUND = 12 };
  if (size < SIGNATURE || memcmp(bytes, "\x89PNG\r\n\x1a\n", SIGNATURE))
    return;
  uint8_t *mended = malloc(size);
  require(mended != NULL);
  memcpy(mended, bytes, size);
  for (size_t at = SIGNATURE; size - at >= AROUND;) {
    size_t length = big_endian(mended + at);
    if (length > size - at - AROUND)
      break;
    uint32_t sum = (uint32_t)crc32(0, mended + at + 4, (uInt)length + 4);
    for (int k = 0; k < 4; k++)
      mended[at + 8 + length + (size_t)k] = (uint8_t)(sum >> (24 - 8 * k));
    at += AROUND + length;
  }
  if (memcmp(mended, bytes, size))
    decode_all_ways(mended, size);
  free(mended);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  orepa_set_memory_limit(cpu(), 1 << 23); /* large pictures take long, and show nothing new */
  decode_all_ways(bytes, size);
  decode_mended(bytes, size);
  return 0;
}
