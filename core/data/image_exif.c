/* image_exif.c: which way up a picture is, from its EXIF block: a TIFF file whose first folder may hold the tag
 * Orientation (EXIF 2.32, 4.6.4). Whatever is wrong with the block, the picture is then as it is stored. */
#include "data/image.h"

enum { UPRIGHT = 1, LAST_ORIENTATION = 8, TAG_ORIENTATION = 0x0112, TYPE_SHORT = 3, ENTRY_BYTES = 12 };

typedef struct {
  const unsigned char *bytes;
  size_t size;
  bool little;
} tiff;

/* A number of 2 or 4 bytes; 0 beyond the end. */
static uint32_t number_at(const tiff *t, size_t at, int width) {
  if (at > t->size || t->size - at < (size_t)width)
    return 0;
  uint32_t number = 0;
  for (int k = 0; k < width; k++)
    number = number << 8 | t->bytes[at + (size_t)(t->little ? width - 1 - k : k)];
  return number;
}

int image_orientation(const unsigned char *exif, size_t size) {
  tiff t = {exif, size, size > 0 && exif[0] == 'I'};
  uint32_t order = number_at(&t, 0, 2), version = number_at(&t, 2, 2);
  if ((order != 0x4949 && order != 0x4d4d) || version != 42)
    return UPRIGHT;
  size_t folder = number_at(&t, 4, 4), count = number_at(&t, folder, 2);
  for (size_t k = 0; k < count; k++) {
    size_t entry = folder + 2 + k * ENTRY_BYTES;
    if (number_at(&t, entry, 2) != TAG_ORIENTATION)
      continue;
    uint32_t value = number_at(&t, entry + 8, 2);
    bool known = number_at(&t, entry + 2, 2) == TYPE_SHORT && value >= UPRIGHT && value <= LAST_ORIENTATION;
    return known ? (int)value : UPRIGHT;
  }
  return UPRIGHT;
}
