/* orepa_image.h: pictures in files, PNG and JPEG, as tensors and back.
 *
 * All functions may be called from several threads at once; no graph is recorded. As in orepa.h, a function that fails
 * returns NULL or -1 and leaves a message for orepa_error, which begins with the path or name. */
#ifndef OREPA_IMAGE_H
#define OREPA_IMAGE_H

#include "orepa.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- reading ----------------------------------------------------------------------------------------------------- */

typedef struct {
  int channels;        /* 1, 3 or 4; 0: 1 for gray and 3 for colour, transparency left out */
  bool as_float;       /* float32, bytes / 255 or 16-bit samples / 65535; else uint8 */
  bool as_stored;      /* not turned as the picture's EXIF orientation says */
  bool indices;        /* of a PNG with a palette: its indices, not its colours */
  int64_t at_least[2]; /* height, width of the result that suffice; 0: the picture's own */
} orepa_image_options;

/* The picture (C, H, W) on the device "cpu", row-major; options may be NULL. PNG or JPEG, which the first bytes say.
 *
 * PNG: all types, interlaced ones too. Palettes become colours. 16-bit samples v become (255 v + 32895) >> 16 as bytes.
 * JPEG: baseline, progressive and, where libjpeg knows it, arithmetic; YCbCr, RGB, gray, and CMYK and YCCK, stored
 * inverted as everyone does, of which red is C K / 255 and so on. At 1/2, 1/4 or 1/8 of its size (computed while it is
 * decoded, and faster) where that is still `at_least` both ways; a PNG always comes whole.
 *
 * Gray of colours is (19595 R + 38470 G + 7471 B + 32768) >> 16. Transparency that was not there is opaque; what is
 * left out is dropped, not mixed with a background. Gamma and colour profiles are not applied.
 *
 * A picture that is cut off or damaged so that pixels are lost is refused; so are sizes that the file's bytes cannot
 * hold, before memory is asked for. */
OREPA_API orepa_tensor *orepa_load_image(const char *path, const orepa_image_options *options);
/* The same of a file's bytes in memory; `name` stands for the path in messages. */
OREPA_API orepa_tensor *orepa_decode_image(const char *name, const void *bytes, size_t size,
                                           const orepa_image_options *options);

/* ---- writing ----------------------------------------------------------------------------------------------------- */

typedef enum {
  OREPA_IMAGE_BY_NAME, /* .png, .jpg or .jpeg, in any case */
  OREPA_IMAGE_PNG,
  OREPA_IMAGE_JPEG
} orepa_image_format;

typedef struct {
  orepa_image_format format;
  int quality;     /* of a JPEG, 1 to 100; 0: 90 */
  int compression; /* of a PNG, 1 to 9, as zlib counts; 0: 6 */
} orepa_image_encoding;

/* Writes (H, W) or (C, H, W), C being 1, 3 or, for PNG, 4. uint8 as it is; floats x as x * 255, rounded, where what is
 * outside 0 to 1 is clamped and NaN is 0; bool as 0 and 255. Any device. The file is written beside the path, synced
 * and renamed: after a failure the path holds what it held before. */
OREPA_API int orepa_save_image(const char *path, orepa_tensor *t, const orepa_image_encoding *how);
/* The same into memory, which the caller gives back with free. */
OREPA_API int orepa_encode_image(orepa_tensor *t, const orepa_image_encoding *how, void **bytes, size_t *size);

#ifdef __cplusplus
}
#endif
#endif
