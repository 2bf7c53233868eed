/* image_jpeg.c: JPEG by libjpeg, from memory to a raster and back. */
#include <setjmp.h>
#include <stdio.h> /* jpeglib.h wants FILE */
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include <jerror.h> /* asks for what jpeglib.h defines */

#include "data/image.h"
#include "device.h"
#include "error.h"

/* ---- reading ---- */

enum { MOST_SCANS = 500 /* real ones have about ten; each is a pass over all pixels */ };

typedef struct {
  struct jpeg_decompress_struct jpeg;
  struct jpeg_error_mgr errors;
  struct jpeg_source_mgr bytes;
  struct jpeg_progress_mgr progress;
  image_source *source;
  bool knows_header;
  bool ended; /* the decoder asked for more bytes than there are */
  jmp_buf escape;
} jpeg_reading;

/* Leaves with what the library says is wrong. */
static void refuse(jpeg_reading *r) {
  char message[JMSG_LENGTH_MAX];
  const char *name = r->source->name;
  int code = r->errors.msg_code;
  r->errors.format_message((j_common_ptr)&r->jpeg, message);
  if (code == JERR_OUT_OF_MEMORY || code == JERR_NO_BACKING_STORE)
    error_out_of_memory("%s: out of memory while it was decoded", name);
  else if (r->ended)
    error_set("%s: is cut off: it ends after %zu bytes, before its picture does", name, r->source->size);
  else
    error_set("%s: is damaged, near byte %zu: %s", name, r->source->size - r->bytes.bytes_in_buffer, message);
  longjmp(r->escape, 1);
}

static void on_error(j_common_ptr jpeg) {
  refuse(jpeg->client_data);
}

/* Warnings of the decoder have level -1. Those after which pixels are made up are errors here; others, such as a few
 * bytes too many between two segments, are common in the wild and harmless. */
static void on_message(j_common_ptr jpeg, int level) {
  jpeg_reading *r = jpeg->client_data;
  switch (level < 0 ? r->errors.msg_code : 0) {
  case JWRN_HIT_MARKER:
  case JWRN_HUFF_BAD_CODE:
  case JWRN_ARITH_BAD_CODE:
  case JWRN_MUST_RESYNC:
    refuse(r);
  }
}

static void no_output(j_common_ptr jpeg) {
  (void)jpeg;
}

static void on_progress(j_common_ptr jpeg) {
  jpeg_reading *r = jpeg->client_data;
  if (r->jpeg.input_scan_number <= MOST_SCANS)
    return;
  error_set("%s: has more than %d scans", r->source->name, MOST_SCANS);
  longjmp(r->escape, 1);
}

static void no_change(j_decompress_ptr jpeg) {
  (void)jpeg;
}

/* All bytes were given at the start. Where the picture ends without its end marker, but whole, that marker is made up;
 * where scans may be missing, or would be without a word, the file is refused. */
static boolean on_end(j_decompress_ptr jpeg) {
  static const JOCTET end[] = {0xff, JPEG_EOI};
  jpeg_reading *r = jpeg->client_data;
  r->ended = true;
  if (!r->knows_header || jpeg->progressive_mode || jpeg->arith_code || jpeg_has_multiple_scans(jpeg))
    ERREXIT(jpeg, JERR_INPUT_EOF);
  jpeg->src->next_input_byte = end;
  jpeg->src->bytes_in_buffer = sizeof end;
  return TRUE;
}

static void skip_bytes(j_decompress_ptr jpeg, long count) {
  struct jpeg_source_mgr *bytes = jpeg->src;
  if (count > 0 && (size_t)count > bytes->bytes_in_buffer) {
    on_end(jpeg);
  } else if (count > 0) {
    bytes->next_input_byte += count;
    bytes->bytes_in_buffer -= (size_t)count;
  }
}

static void find_orientation(jpeg_reading *r) {
  static const char mark[6] = "Exif\0";
  for (jpeg_saved_marker_ptr m = r->jpeg.marker_list; m; m = m->next)
    if (m->data_length > sizeof mark && !memcmp(m->data, mark, sizeof mark)) {
      r->source->orientation = image_orientation(m->data + sizeof mark, m->data_length - sizeof mark);
      return;
    }
}

/* Divides the size by 8, 4 or 2 where what is left is enough. */
static void choose_scale(jpeg_reading *r) {
  const orepa_image_options *options = r->source->options;
  bool turned = r->source->orientation > 4 && !options->as_stored;
  int64_t height = options->at_least[turned], width = options->at_least[!turned];
  int divisor = height > 0 && width > 0 ? 8 : 1;
  while (divisor > 1 && ((r->jpeg.image_height + (unsigned)divisor - 1) / (unsigned)divisor < height ||
                         (r->jpeg.image_width + (unsigned)divisor - 1) / (unsigned)divisor < width))
    divisor /= 2;
  r->jpeg.scale_num = 1;
  r->jpeg.scale_denom = (unsigned)divisor;
}

static int choose_colours(jpeg_reading *r) {
  switch (r->jpeg.jpeg_color_space) {
  case JCS_GRAYSCALE:
    r->jpeg.out_color_space = JCS_GRAYSCALE;
    r->source->raster.samples = 1;
    return 0;
  case JCS_RGB:
  case JCS_YCbCr:
    r->jpeg.out_color_space = JCS_RGB;
    r->source->raster.samples = 3;
    return 0;
  case JCS_CMYK:
  case JCS_YCCK:
    r->jpeg.out_color_space = JCS_CMYK;
    r->source->raster.samples = 3;
    return 0;
  default:
    return error_set("%s: has %d components, of which nothing says what colours they are", r->source->name,
                     r->jpeg.num_components);
  }
}

static int read_header(jpeg_reading *r) {
  /* Huffman codes have a bit at least, and each block has one. Arithmetic codes have no such limit: 4096 x 4096 pixels
   * of one colour are 216 bytes. A little more for each byte is believed, but not what would keep the decoder busy for
   * ever.
   */
  enum { MOST_PIXELS = 8 * DCTSIZE2, MOST_ARITHMETIC_PIXELS = 1 << 17 };
  image_source *source = r->source;
  jpeg_save_markers(&r->jpeg, JPEG_APP0 + 1, 0xffff);
  jpeg_read_header(&r->jpeg, TRUE);
  r->knows_header = true;
  find_orientation(r);
  source->raster.height = r->jpeg.image_height;
  source->raster.width = r->jpeg.image_width;
  if (source->options->indices)
    return error_set("%s: is a JPEG: its pixels are colours, not indices of a palette", source->name);
  if (image_check_size(source, r->jpeg.arith_code ? MOST_ARITHMETIC_PIXELS : MOST_PIXELS))
    return -1;
  choose_scale(r);
  return choose_colours(r);
}

/* One row of inverted cyan, magenta, yellow and black to red, green and blue: C K / 255 and so on, rounded. */
static void unpack_inks(const unsigned char *inks, unsigned char *colours, int64_t width) {
  for (int64_t x = 0; x < width; x++, inks += 4)
    for (int c = 0; c < 3; c++)
      *colours++ = (unsigned char)((2 * inks[c] * inks[3] + 255) / 510);
}

static void read_rows(jpeg_reading *r) {
  image_raster *raster = &r->source->raster;
  size_t row = raster->bytes / (size_t)raster->height;
  j_common_ptr common = (j_common_ptr)&r->jpeg;
  bool inks = r->jpeg.out_color_space == JCS_CMYK;
  JSAMPROW line = inks ? r->jpeg.mem->alloc_large(common, JPOOL_IMAGE, 4 * (size_t)raster->width) : NULL;
  for (unsigned y = 0; y < r->jpeg.output_height; y++) {
    unsigned char *to = raster->data + y * row;
    JSAMPROW into = inks ? line : to;
    jpeg_read_scanlines(&r->jpeg, &into, 1);
    if (inks)
      unpack_inks(line, to, raster->width);
  }
}

/* Of a picture in several scans the library keeps all coefficients: within the limit of the engine's memory. */
static void limit_memory(jpeg_reading *r) {
  orepa_memory_info info = orepa_memory(cpu_device());
  r->jpeg.mem->max_memory_to_use = info.limit > info.live ? (long)(info.limit - info.live) : 1;
}

static int read_picture(jpeg_reading *r) {
  image_raster *raster = &r->source->raster;
  jpeg_create_decompress(&r->jpeg);
  r->jpeg.client_data = r;
  r->jpeg.src = &r->bytes;
  r->jpeg.progress = &r->progress;
  if (read_header(r))
    return -1;
  jpeg_calc_output_dimensions(&r->jpeg);
  raster->height = r->jpeg.output_height;
  raster->width = r->jpeg.output_width;
  raster->sample_bytes = 1;
  if (image_raster_make(raster, r->source->name))
    return -1;
  if (jpeg_has_multiple_scans(&r->jpeg))
    limit_memory(r);
  jpeg_start_decompress(&r->jpeg);
  read_rows(r);
  return 0;
}

static int read_guarded(jpeg_reading *r) {
  if (setjmp(r->escape))
    return -1;
  return read_picture(r);
}

static void set_errors(struct jpeg_error_mgr *errors) {
  jpeg_std_error(errors);
  errors->error_exit = on_error;
  errors->emit_message = on_message;
  errors->output_message = no_output;
}

int image_decode_jpeg(image_source *source) {
  jpeg_reading r = {.source = source};
  set_errors(&r.errors);
  r.jpeg.err = &r.errors;
  r.jpeg.client_data = &r;
  r.progress.progress_monitor = on_progress;
  r.bytes = (struct jpeg_source_mgr){source->bytes, source->size,           no_change, on_end,
                                     skip_bytes,    jpeg_resync_to_restart, no_change};
  int failed = read_guarded(&r);
  jpeg_destroy_decompress(&r.jpeg);
  return failed;
}

/* ---- writing ---- */

typedef struct {
  struct jpeg_compress_struct jpeg;
  struct jpeg_error_mgr errors;
  struct jpeg_destination_mgr room;
  JOCTET buffer[1 << 14];
  const image_raster *raster;
  int quality;
  image_bytes *bytes;
  jmp_buf escape;
} jpeg_writing;

static void on_write_error(j_common_ptr jpeg) {
  char message[JMSG_LENGTH_MAX];
  jpeg_writing *w = jpeg->client_data;
  w->errors.format_message(jpeg, message);
  if (w->errors.msg_code == JERR_OUT_OF_MEMORY)
    error_out_of_memory("out of memory while it was encoded as JPEG");
  else
    error_set("cannot be written as JPEG: %s", message);
  longjmp(w->escape, 1);
}

static void on_write_message(j_common_ptr jpeg, int level) {
  (void)jpeg;
  (void)level;
}

static void empty_buffer(j_compress_ptr jpeg) {
  jpeg_writing *w = jpeg->client_data;
  w->room.next_output_byte = w->buffer;
  w->room.free_in_buffer = sizeof w->buffer;
}

static void keep_bytes(jpeg_writing *w, size_t size) {
  if (!image_bytes_add(w->bytes, w->buffer, size))
    return;
  error_out_of_memory("out of memory: no room for the JPEG file");
  longjmp(w->escape, 1);
}

static boolean on_full(j_compress_ptr jpeg) {
  jpeg_writing *w = jpeg->client_data;
  keep_bytes(w, sizeof w->buffer);
  empty_buffer(jpeg);
  return TRUE;
}

static void on_last(j_compress_ptr jpeg) {
  jpeg_writing *w = jpeg->client_data;
  keep_bytes(w, sizeof w->buffer - w->room.free_in_buffer);
}

static int write_guarded(jpeg_writing *w) {
  const image_raster *raster = w->raster;
  if (setjmp(w->escape))
    return -1;
  jpeg_create_compress(&w->jpeg);
  w->jpeg.client_data = w;
  w->jpeg.dest = &w->room;
  w->jpeg.image_height = (JDIMENSION)raster->height;
  w->jpeg.image_width = (JDIMENSION)raster->width;
  w->jpeg.input_components = raster->samples;
  w->jpeg.in_color_space = raster->samples == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_set_defaults(&w->jpeg);
  jpeg_set_quality(&w->jpeg, w->quality, TRUE);
  jpeg_start_compress(&w->jpeg, TRUE);
  size_t row = raster->bytes / (size_t)raster->height;
  for (int64_t y = 0; y < raster->height; y++) {
    JSAMPROW line = raster->data + (size_t)y * row;
    jpeg_write_scanlines(&w->jpeg, &line, 1);
  }
  jpeg_finish_compress(&w->jpeg);
  return 0;
}

int image_encode_jpeg(const image_raster *raster, int quality, image_bytes *bytes) {
  enum { LARGEST = 65500 };
  if (raster->height > LARGEST || raster->width > LARGEST)
    return error_set("cannot be written as JPEG: %lld x %lld pixels, at most %d each way", (long long)raster->height,
                     (long long)raster->width, LARGEST);
  jpeg_writing w = {.raster = raster, .quality = quality, .bytes = bytes};
  jpeg_std_error(&w.errors);
  w.errors.error_exit = on_write_error;
  w.errors.emit_message = on_write_message;
  w.jpeg.err = &w.errors;
  w.jpeg.client_data = &w;
  w.room = (struct jpeg_destination_mgr){w.buffer, sizeof w.buffer, empty_buffer, on_full, on_last};
  int failed = write_guarded(&w);
  jpeg_destroy_compress(&w.jpeg);
  return failed;
}
