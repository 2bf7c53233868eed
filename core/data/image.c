/* image.c: pictures as tensors: which decoder a file wants, and rasters to tensors and back. */
#include "data/image.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "io/file.h"
#include "io/format.h"
#include "orepa_io.h"
#include "tensor/tensor.h"

/* ---- rasters ---- */

int image_raster_make(image_raster *raster, const char *name) {
  const int64_t shape[] = {raster->height, raster->width, raster->samples};
  int64_t bytes = format_count_bytes((size_t)raster->sample_bytes, 3, shape);
  if (bytes < 0)
    return error_set("%s: %lld x %lld pixels are more than can be addressed", name, (long long)raster->height,
                     (long long)raster->width);
  raster->data = allocator_get(cpu_device(), (size_t)bytes);
  raster->bytes = (size_t)bytes;
  return raster->data ? 0 : error_prefix("%s: ", name);
}

void image_raster_free(image_raster *raster) {
  allocator_put(cpu_device(), raster->data, raster->bytes);
}

int image_check_size(const image_source *source, double most) {
  double pixels = (double)source->raster.height * (double)source->raster.width;
  if (pixels <= most * (double)source->size)
    return 0;
  return error_set("%s: claims %lld x %lld pixels, more than its %zu bytes can hold", source->name,
                   (long long)source->raster.height, (long long)source->raster.width, source->size);
}

int image_bytes_add(image_bytes *bytes, const void *data, size_t size) {
  if (size > bytes->capacity - bytes->size) {
    size_t capacity = 2 * (bytes->size + size);
    unsigned char *grown = realloc(bytes->data, capacity);
    if (!grown)
      return -1;
    bytes->data = grown;
    bytes->capacity = capacity;
  }
  memcpy(bytes->data + bytes->size, data, size);
  bytes->size += size;
  return 0;
}

/* ---- from a raster to a tensor ---- */

/* A raster as it is looked at: turned, by where its first pixel lies and how far the next ones are, in bytes. */
typedef struct {
  const unsigned char *first;
  int64_t height, width, down, right;
  int samples, channels;
} raster_view;

/* EXIF's orientations: 1 upright, 2 mirrored; 3, 4 the same upside down; 5 to 8 with rows as columns. */
static raster_view view_of(const image_raster *raster, int orientation, int channels) {
  bool swapped = orientation > 4;
  bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  bool from_below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  int64_t pixel = raster->samples * raster->sample_bytes, row = pixel * raster->width;
  int64_t along_row = from_right ? -pixel : pixel, along_column = from_below ? -row : row;
  return (raster_view){
      .first = raster->data + (from_right ? row - pixel : 0) + (from_below ? (raster->height - 1) * row : 0),
      .height = swapped ? raster->width : raster->height,
      .width = swapped ? raster->height : raster->width,
      .down = swapped ? along_row : along_column,
      .right = swapped ? along_column : along_row,
      .samples = raster->samples,
      .channels = channels,
  };
}

/* Fills planes (C, H, W). */
#define DEFINE_UNPACK(name, sample, element, most, converted)                                                          \
  static inline element name##_value(uint32_t v) {                                                                     \
    return (element)(converted);                                                                                       \
  }                                                                                                                    \
  static void name(const raster_view *view, element *to) {                                                             \
    const int64_t plane = view->height * view->width;                                                                  \
    const int green = view->samples >= 3 ? 1 : 0, blue = 2 * green, opacity = view->samples - 1;                       \
    const bool has_opacity = view->samples == 2 || view->samples == 4;                                                 \
    for (int64_t y = 0; y < view->height; y++) {                                                                       \
      const unsigned char *at = view->first + y * view->down;                                                          \
      for (int64_t x = 0; x < view->width; x++, at += view->right, to++) {                                             \
        const sample *v = (const sample *)at;                                                                          \
        if (view->channels == 1) {                                                                                     \
          *to = name##_value(green ? gray_of(v[0], v[1], v[2]) : v[0]);                                                \
          continue;                                                                                                    \
        }                                                                                                              \
        to[0] = name##_value(v[0]);                                                                                    \
        to[plane] = name##_value(v[green]);                                                                            \
        to[2 * plane] = name##_value(v[blue]);                                                                         \
        if (view->channels == 4)                                                                                       \
          to[3 * plane] = name##_value(has_opacity ? v[opacity] : most);                                               \
      }                                                                                                                \
    }                                                                                                                  \
  }

/* ITU-R BT.601, in 65536ths: of 16-bit samples too it stays below 2^32. */
static inline uint32_t gray_of(uint32_t red, uint32_t green, uint32_t blue) {
  return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16;
}

DEFINE_UNPACK(bytes_to_bytes, uint8_t, uint8_t, 255, v)
DEFINE_UNPACK(bytes_to_floats, uint8_t, float, 255, (float)v / 255)
DEFINE_UNPACK(shorts_to_floats, uint16_t, float, 65535, (float)v / 65535)

static orepa_tensor *tensor_of(const image_source *source) {
  const image_raster *raster = &source->raster;
  const orepa_image_options *options = source->options;
  int channels = options->channels ? options->channels : raster->samples >= 3 ? 3 : 1;
  raster_view view = view_of(raster, options->as_stored ? 1 : source->orientation, channels);
  const int64_t shape[] = {channels, view.height, view.width};
  orepa_tensor *t = tensor_new(options->as_float ? OREPA_FLOAT32 : OREPA_UINT8, cpu_device(), 3, shape);
  device_array array;
  if (t && tensor_writes(t, &array))
    t = tensor_fail(t);
  if (!t) {
    error_prefix("%s: ", source->name);
    return NULL;
  }
  if (!options->as_float)
    bytes_to_bytes(&view, array.data);
  else if (raster->sample_bytes == 1)
    bytes_to_floats(&view, array.data);
  else
    shorts_to_floats(&view, array.data);
  return t;
}

/* ---- files ---- */

typedef int image_decoder(image_source *source);

enum { START_BYTES = 16 };

/* Other kinds of pictures, for the message; '?' stands for any byte. */
static const char *other_picture(const unsigned char *start, size_t size) {
  static const struct {
    const char *start;
    size_t length;
    const char *what;
  } others[] = {
      {"GIF8", 4, "a GIF picture"},
      {"RIFF????WEBP", 12, "a WebP picture"},
      {"BM", 2, "a BMP picture"},
      {"II*\0", 4, "a TIFF picture"},
      {"MM\0*", 4, "a TIFF picture"},
      {"????ftyp", 8, "a picture or film of the MP4 family (HEIC, AVIF)"},
      {"\0\0\0\14jP", 6, "a JPEG 2000 picture"},
      {"\0\0\0\14JXL", 7, "a JPEG XL picture"},
      {"\xff\xd8", 2, "the beginning of a JPEG picture"},
      {"\x89PNG", 4, "a PNG picture that was changed as if it were text"},
  };
  for (size_t k = 0; k < sizeof others / sizeof *others; k++) {
    size_t same = 0;
    while (same < others[k].length && same < size &&
           (others[k].start[same] == '?' || start[same] == (unsigned char)others[k].start[same]))
      same++;
    if (same == others[k].length)
      return others[k].what;
  }
  return NULL;
}

/* What can read the file, by its first bytes; NULL and a message. */
static image_decoder *decoder_of(const file_reader *file) {
  unsigned char start[START_BYTES] = {0};
  size_t size = file->size < START_BYTES ? (size_t)file->size : START_BYTES;
  if (file_read(file, 0, start, size))
    return NULL;
  if (!memcmp(start, "\x89PNG\r\n\x1a\n", 8))
    return image_decode_png;
  if (!memcmp(start, "\xff\xd8\xff", 3))
    return image_decode_jpeg;
  const char *what = size == 0 ? "empty" : other_picture(start, size);
  if (!what)
    what = format_stranger(file);
  if (what)
    error_set("%s: is %s, neither PNG nor JPEG", file->path, what);
  else
    error_set("%s: is neither PNG nor JPEG: it starts with %02x %02x %02x %02x", file->path, start[0], start[1],
              start[2], start[3]);
  return NULL;
}

static int check_options(const char *name, const orepa_image_options *options) {
  int channels = options->channels;
  if (channels != 0 && channels != 1 && channels != 3 && channels != 4)
    return error_set("%s: %d channels; there are 1, 3 and 4", name, channels);
  if (options->at_least[0] < 0 || options->at_least[1] < 0)
    return error_set("%s: at least %lld x %lld pixels", name, (long long)options->at_least[0],
                     (long long)options->at_least[1]);
  if (options->indices && (channels > 1 || options->as_float))
    return error_set("%s: indices of a palette are uint8 and have one channel", name);
  return 0;
}

static orepa_tensor *decode(image_decoder *decoder, const char *name, const void *bytes, size_t size,
                            const orepa_image_options *options) {
  image_source source = {.name = name, .bytes = bytes, .size = size, .options = options, .orientation = 1};
  orepa_tensor *t = decoder(&source) ? NULL : tensor_of(&source);
  image_raster_free(&source.raster);
  return t;
}

static const orepa_image_options plain;

orepa_tensor *orepa_decode_image(const char *name, const void *bytes, size_t size, const orepa_image_options *options) {
  file_reader file = file_in_memory(name, bytes, size);
  options = options ? options : &plain;
  image_decoder *decoder = check_options(name, options) ? NULL : decoder_of(&file);
  return decoder ? decode(decoder, name, bytes, size, options) : NULL;
}

static orepa_tensor *load(const file_reader *file, const orepa_image_options *options) {
  image_decoder *decoder = check_options(file->path, options) ? NULL : decoder_of(file);
  if (!decoder)
    return NULL;
  size_t size = (size_t)file->size;
  void *bytes = allocator_get(cpu_device(), size);
  if (!bytes) {
    error_prefix("%s: ", file->path);
    return NULL;
  }
  orepa_tensor *t = file_read(file, 0, bytes, size) ? NULL : decode(decoder, file->path, bytes, size, options);
  allocator_put(cpu_device(), bytes, size);
  return t;
}

orepa_tensor *orepa_load_image(const char *path, const orepa_image_options *options) {
  file_reader file;
  if (file_open(&file, path))
    return NULL;
  orepa_tensor *t = load(&file, options ? options : &plain);
  file_close(&file);
  return t;
}

/* ---- from a tensor to a raster ---- */

static int check_picture(const orepa_tensor *t) {
  bool has_type = orepa_dtype_is_float(t->dtype) || t->dtype == OREPA_UINT8 || t->dtype == OREPA_BOOL;
  int64_t channels = t->rank == 3 ? t->shape[0] : 1;
  bool has_shape = (t->rank == 2 || t->rank == 3) && (channels == 1 || channels == 3 || channels == 4);
  if (has_type && has_shape && orepa_count(t))
    return 0;
  return error_set("%s is no picture: uint8, bool or floats, (H, W) or (C, H, W) with 1, 3 or 4 channels, not empty",
                   tensor_text(t));
}

static unsigned char byte_of(float x) {
  return (unsigned char)(x >= 1 ? 255 : x > 0 ? x * 255 + 0.5f : 0);
}

/* `from` is float32, or of one byte: a bool counts as 255. */
static void pack(const device_array *from, orepa_dtype dtype, image_raster *raster) {
  const int row = from->rank - 2, column = from->rank - 1;
  const int64_t plane = from->rank == 3 ? from->strides[0] : 0;
  unsigned char *to = raster->data;
  for (int64_t y = 0; y < raster->height; y++)
    for (int64_t x = 0; x < raster->width; x++)
      for (int c = 0; c < raster->samples; c++) {
        int64_t at = y * from->strides[row] + x * from->strides[column] + c * plane;
        if (dtype == OREPA_FLOAT32)
          *to++ = byte_of(((const float *)from->data)[at]);
        else
          *to++ = (unsigned char)(((const unsigned char *)from->data)[at] * (dtype == OREPA_BOOL ? 255 : 1));
      }
}

static int raster_of(orepa_tensor *t, image_raster *raster) {
  raster->height = t->shape[t->rank - 2];
  raster->width = t->shape[t->rank - 1];
  raster->samples = t->rank == 3 ? (int)t->shape[0] : 1;
  raster->sample_bytes = 1;
  orepa_tensor *plain_copy = orepa_detach(t);
  orepa_dtype dtype = orepa_dtype_is_float(t->dtype) ? OREPA_FLOAT32 : t->dtype;
  orepa_tensor *here = plain_copy ? orepa_to(plain_copy, dtype, cpu_device()) : NULL;
  device_array array;
  int failed = !here || tensor_reads(here, &array) || image_raster_make(raster, "a picture");
  if (!failed)
    pack(&array, dtype, raster);
  orepa_release(here);
  orepa_release(plain_copy);
  return failed ? -1 : 0;
}

/* ---- writing ---- */

static int encode_raster(const image_raster *raster, const orepa_image_encoding *how, image_bytes *bytes) {
  if (how->format == OREPA_IMAGE_PNG)
    return image_encode_png(raster, how->compression ? how->compression : 6, bytes);
  return image_encode_jpeg(raster, how->quality ? how->quality : 90, bytes);
}

static int check_encoding(const orepa_tensor *t, const orepa_image_encoding *how) {
  if (how->format != OREPA_IMAGE_PNG && how->format != OREPA_IMAGE_JPEG)
    return error_set("nothing says whether PNG or JPEG is meant");
  if (how->quality < 0 || how->quality > 100 || how->compression < 0 || how->compression > 9)
    return error_set("quality %d and compression %d; they go from 1 to 100 and from 1 to 9", how->quality,
                     how->compression);
  if (how->format == OREPA_IMAGE_PNG && how->quality)
    return error_set("a PNG has no quality: it keeps every bit");
  if (how->format == OREPA_IMAGE_JPEG && how->compression)
    return error_set("a JPEG has a quality instead of a compression");
  if (check_picture(t))
    return -1;
  if (how->format == OREPA_IMAGE_JPEG && t->rank == 3 && t->shape[0] == 4)
    return error_set("%s has an opacity, which JPEG cannot keep", tensor_text(t));
  return 0;
}

int orepa_encode_image(orepa_tensor *t, const orepa_image_encoding *how, void **bytes, size_t *size) {
  if (check_encoding(t, how))
    return -1;
  image_raster raster = {0};
  image_bytes encoded = {0};
  int failed = raster_of(t, &raster) || encode_raster(&raster, how, &encoded);
  image_raster_free(&raster);
  if (failed)
    free(encoded.data);
  *bytes = failed ? NULL : encoded.data;
  *size = failed ? 0 : encoded.size;
  return failed ? -1 : 0;
}

static int format_by_name(const char *path, orepa_image_format *format) {
  const char *dot = strrchr(path, '.');
  if (dot && !strcasecmp(dot, ".png"))
    *format = OREPA_IMAGE_PNG;
  else if (dot && (!strcasecmp(dot, ".jpg") || !strcasecmp(dot, ".jpeg")))
    *format = OREPA_IMAGE_JPEG;
  else
    return error_set("%s: a picture's name ends in .png, .jpg or .jpeg, unless its format is named", path);
  return 0;
}

int orepa_save_image(const char *path, orepa_tensor *t, const orepa_image_encoding *how) {
  orepa_image_encoding encoding = *how;
  void *bytes;
  size_t size;
  if (encoding.format == OREPA_IMAGE_BY_NAME && format_by_name(path, &encoding.format))
    return -1;
  if (orepa_encode_image(t, &encoding, &bytes, &size))
    return error_prefix("%s: ", path);
  int failed = orepa_write_file(path, bytes, size);
  free(bytes);
  return failed;
}
