/* image_png.c: PNG by libpng, from memory to a raster and back. */
#include <png.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include "data/image.h"
#include "error.h"

/* libpng says of memory that ran out no more than that something failed. */
static png_voidp get_memory(png_structp png, png_alloc_size_t bytes) {
  bool *out_of_memory = png_get_mem_ptr(png);
  void *memory = malloc(bytes);
  *out_of_memory |= !memory;
  return memory;
}

static void put_memory(png_structp png, png_voidp memory) {
  (void)png;
  free(memory);
}

/* What it warns of costs no pixel. */
static void on_warning(png_structp png, png_const_charp message) {
  (void)png;
  (void)message;
}

/* ---- reading ---- */

typedef struct {
  image_source *source;
  size_t position;
  png_structp png;
  png_infop info;
  bool out_of_memory;
  jmp_buf escape;
} png_reading;

static void on_read_error(png_structp png, png_const_charp message) {
  png_reading *r = png_get_error_ptr(png);
  if (r->out_of_memory)
    error_out_of_memory("%s: out of memory while it was decoded", r->source->name);
  else
    error_set("%s: is damaged, near byte %zu: %s", r->source->name, r->position, message);
  longjmp(r->escape, 1);
}

static void give_bytes(png_structp png, png_bytep to, size_t bytes) {
  png_reading *r = png_get_io_ptr(png);
  const image_source *source = r->source;
  if (bytes > source->size - r->position) {
    error_set("%s: is cut off: it ends after %zu bytes, before its picture does", source->name, source->size);
    longjmp(r->escape, 1);
  }
  memcpy(to, source->bytes + r->position, bytes);
  r->position += bytes;
}

static int on_chunk(png_structp png, png_unknown_chunkp chunk) {
  png_reading *r = png_get_user_chunk_ptr(png);
  if (!memcmp(chunk->name, "eXIf", 4))
    r->source->orientation = image_orientation(chunk->data, chunk->size);
  return 1;
}

/* Profiles and texts are of no use here, and may unpack to much; libpng's own reading of EXIF asks for as much memory
 * as the chunk claims. All of these are read as unknown ones, no larger than the file. */
static void choose_chunks(png_reading *r) {
  static const png_byte names[] = "eXIf\0iCCP\0iTXt\0tEXt\0zTXt\0sPLT\0hIST";
  png_set_keep_unknown_chunks(r->png, PNG_HANDLE_CHUNK_NEVER, names, (int)(sizeof names / 5));
  png_set_chunk_malloc_max(r->png, r->source->size);
  png_set_read_user_chunk_fn(r->png, r, on_chunk);
}

/* Asks for samples of 8 bits, or of 16 where they are wanted and there; a palette's colours or its indices. */
static void choose_samples(png_reading *r, bool has_palette, int depth) {
  const orepa_image_options *options = r->source->options;
  if (options->indices && has_palette)
    png_set_packing(r->png);
  else
    png_set_expand(r->png);
  if (depth == 16 && !options->as_float)
    png_set_scale_16(r->png);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  else if (depth == 16)
    png_set_swap(r->png);
#endif
}

static int read_header(png_reading *r) {
  enum { MOST_EXPANDED = 1032 /* deflate makes of a byte at most so many */ };
  image_source *source = r->source;
  png_uint_32 width, height;
  int depth, type;
  png_read_info(r->png, r->info);
  png_get_IHDR(r->png, r->info, &width, &height, &depth, &type, NULL, NULL, NULL);
  source->raster.width = width;
  source->raster.height = height;
  int bits = depth * png_get_channels(r->png, r->info);
  if (image_check_size(source, 8.0 * MOST_EXPANDED / bits))
    return -1;
  bool has_palette = type == PNG_COLOR_TYPE_PALETTE;
  if (source->options->indices && !has_palette)
    return error_set("%s: its pixels are colours, not indices of a palette", source->name);
  choose_samples(r, has_palette, depth);
  return 0;
}

static int read_picture(png_reading *r) {
  image_raster *raster = &r->source->raster;
  if (read_header(r))
    return -1;
  int passes = png_set_interlace_handling(r->png);
  png_read_update_info(r->png, r->info);
  raster->samples = png_get_channels(r->png, r->info);
  raster->sample_bytes = png_get_bit_depth(r->png, r->info) / 8;
  if (image_raster_make(raster, r->source->name))
    return -1;
  size_t row = raster->bytes / (size_t)raster->height;
  for (int pass = 0; pass < passes; pass++)
    for (int64_t y = 0; y < raster->height; y++)
      png_read_row(r->png, raster->data + (size_t)y * row, NULL);
  png_read_end(r->png, r->info);
  return 0;
}

static int start_reading(png_reading *r) {
  r->png = png_create_read_struct_2(PNG_LIBPNG_VER_STRING, r, on_read_error, on_warning, &r->out_of_memory, get_memory,
                                    put_memory);
  r->info = r->png ? png_create_info_struct(r->png) : NULL;
  if (!r->info)
    return error_out_of_memory("%s: out of memory while it was decoded", r->source->name);
  png_set_user_limits(r->png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
  png_set_read_fn(r->png, r, give_bytes);
  choose_chunks(r);
  return 0;
}

static int read_guarded(png_reading *r) {
  if (setjmp(r->escape))
    return -1;
  return start_reading(r) || read_picture(r) ? -1 : 0;
}

int image_decode_png(image_source *source) {
  png_reading r = {.source = source};
  int failed = read_guarded(&r);
  png_destroy_read_struct(&r.png, &r.info, NULL);
  return failed;
}

/* ---- writing ---- */

typedef struct {
  const image_raster *raster;
  int compression;
  image_bytes *bytes;
  png_structp png;
  png_infop info;
  bool out_of_memory;
  jmp_buf escape;
} png_writing;

static void on_write_error(png_structp png, png_const_charp message) {
  png_writing *w = png_get_error_ptr(png);
  if (w->out_of_memory)
    error_out_of_memory("out of memory while it was encoded as PNG");
  else
    error_set("cannot be written as PNG: %s", message);
  longjmp(w->escape, 1);
}

static void take_bytes(png_structp png, png_bytep from, size_t size) {
  png_writing *w = png_get_io_ptr(png);
  if (image_bytes_add(w->bytes, from, size)) {
    error_out_of_memory("out of memory: no room for the PNG file");
    longjmp(w->escape, 1);
  }
}

static void no_flush(png_structp png) {
  (void)png;
}

static int write_guarded(png_writing *w) {
  static const int types[] = {0, PNG_COLOR_TYPE_GRAY, PNG_COLOR_TYPE_GRAY_ALPHA, PNG_COLOR_TYPE_RGB,
                              PNG_COLOR_TYPE_RGB_ALPHA};
  const image_raster *raster = w->raster;
  if (setjmp(w->escape))
    return -1;
  w->png = png_create_write_struct_2(PNG_LIBPNG_VER_STRING, w, on_write_error, on_warning, &w->out_of_memory,
                                     get_memory, put_memory);
  w->info = w->png ? png_create_info_struct(w->png) : NULL;
  if (!w->info)
    return error_out_of_memory("out of memory: no room for libpng's state");
  png_set_user_limits(w->png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
  png_set_write_fn(w->png, w, take_bytes, no_flush);
  png_set_compression_level(w->png, w->compression);
  png_set_IHDR(w->png, w->info, (png_uint_32)raster->width, (png_uint_32)raster->height, 8, types[raster->samples],
               PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  png_write_info(w->png, w->info);
  size_t row = raster->bytes / (size_t)raster->height;
  for (int64_t y = 0; y < raster->height; y++)
    png_write_row(w->png, raster->data + (size_t)y * row);
  png_write_end(w->png, w->info);
  return 0;
}

int image_encode_png(const image_raster *raster, int compression, image_bytes *bytes) {
  png_writing w = {.raster = raster, .compression = compression, .bytes = bytes};
  int failed = write_guarded(&w);
  png_destroy_write_struct(&w.png, &w.info);
  return failed;
}
