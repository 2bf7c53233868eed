/* image.h: what the decoders and encoders of pictures share. A raster is a picture as files keep it: rows of pixels,
 * the samples of a pixel side by side.
 *
 * libpng and libjpeg leave by longjmp. Each caller of setjmp has nothing but a pointer to a struct of its caller's, so
 * that nothing is lost, and frees what the library holds on both ways out. */
#ifndef OREPA_CORE_DATA_IMAGE_H
#define OREPA_CORE_DATA_IMAGE_H

#include "orepa_image.h"

/* From the allocator: counted, and limited. */
typedef struct {
  int64_t height, width;
  int samples;      /* of a pixel: 1 gray, 2 gray and opacity, 3 colour, 4 colour and opacity */
  int sample_bytes; /* 1, or 2 in the machine's order */
  unsigned char *data;
  size_t bytes;
} image_raster;

/* Gets memory for the sizes that are set. */
int image_raster_make(image_raster *raster, const char *name);
void image_raster_free(image_raster *raster);

/* ---- decoding: 0, or -1 and a message; the raster is the caller's to free either way */
typedef struct {
  const char *name;
  const unsigned char *bytes;
  size_t size;
  const orepa_image_options *options;
  image_raster raster;
  int orientation; /* EXIF's: 1 to 8 */
} image_source;

int image_decode_png(image_source *source);
int image_decode_jpeg(image_source *source);
/* The orientation in an EXIF block, which is a TIFF file; 1 if it has none. */
int image_orientation(const unsigned char *exif, size_t size);
/* For a picture whose pixels cannot lie in the file's bytes, of which each holds `most` pixels at most. */
int image_check_size(const image_source *source, double most);

/* ---- encoding */
typedef struct {
  unsigned char *data; /* malloc's */
  size_t size, capacity;
} image_bytes;

/* -1: out of memory, without a message. */
int image_bytes_add(image_bytes *bytes, const void *data, size_t size);

int image_encode_png(const image_raster *raster, int compression, image_bytes *bytes);
int image_encode_jpeg(const image_raster *raster, int quality, image_bytes *bytes);

#endif
