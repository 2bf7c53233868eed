/* conv_product.c: convolution as matrix products, float32. By positions where maps are small, by lowering (im2col) in
 * general; both let a library multiply and do the rest. */
#include <omp.h>
#include <string.h>

#include "cpu/conv.h"
#include "cpu/matmul.h"
#include "cpu/onednn.h"

enum {
  MOST_POSITIONS = 64,
  LEAST_DEPTH = 32,        /* terms of a sum under which many small products lose to one kernel */
  LEAST_ROWS = 16,         /* images or output channels that a task by positions should have */
  BAD_STEP = 128,          /* rows at multiples of this many numbers meet in a few cache sets */
  GAP = 16,                /* and this many between them help */
  CHUNK = 1 << 17,         /* numbers of a lowered matrix, for each thread */
  PARALLEL_FROM = 1 << 16, /* numbers or bytes moved */
};

static int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

static int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/* y = bias, or zeros, in rows of `length` that lie `step` apart. */
static void set_rows(float *y, int64_t rows, int64_t length, int64_t step, const float *bias) {
  for (int64_t r = 0; r < rows; r++)
    if (bias)
      memcpy(y + r * step, bias, (size_t)length * sizeof *y);
    else
      memset(y + r * step, 0, (size_t)length * sizeof *y);
}

/* The first failure of several threads. */
static void note(device_status *result, device_status status) {
  if (status != DEVICE_DONE) {
#pragma omp atomic write
    *result = status;
  }
}

/* ---- by positions ---- */

bool conv_positions_suit(conv_direction direction, const conv_geometry *g) {
  if (g->groups != 1 || (g->dilation[1] != 1 && g->kernel[1] != 1))
    return false;
  int64_t positions = pixels(g->result), run = g->kernel[1] * g->in, batch = g->batch;
  int64_t depth = direction == CONV_BACKWARD_DATA ? g->out : direction == CONV_FORWARD ? run : smaller(run, batch);
  int64_t most = direction == CONV_BACKWARD_DATA ? MOST_POSITIONS / 4 : MOST_POSITIONS;
  return positions <= most && positions <= batch && (depth >= LEAST_DEPTH || positions <= 4);
}

/* Maps with the distance between their images. Where that is a bad one, a map is copied with gaps before its images are
 * summed over, unless each of its pixels is read once. */
typedef struct {
  conv_operands c;
  int64_t x_step, y_step;
} images;

static int64_t spaced(const conv_geometry *g, int64_t step) {
  return pixels(g->result) > 1 && !conv_is_point(g) && step % BAD_STEP == 0 ? step + GAP : step;
}

static images images_of(const conv_operands *c) {
  return (images){*c, pixels(c->g->size) * c->g->in, pixels(c->g->result) * c->g->out};
}

size_t conv_positions_scratch(conv_direction direction, const conv_geometry *g) {
  int64_t x_step = pixels(g->size) * g->in, y_step = pixels(g->result) * g->out;
  int64_t x_room = spaced(g, x_step), y_room = spaced(g, y_step);
  int64_t room = (x_room > x_step ? x_room : 0) + (y_room > y_step ? y_room : 0);
  return direction == CONV_BACKWARD_WEIGHT ? (size_t)(g->batch * room) * sizeof(float) : 0;
}

/* Moves a map apart if that is called for; gives back where the next one may go. */
static float *move_apart(const conv_geometry *g, float **map, int64_t *step, float *scratch) {
  int64_t room = spaced(g, *step), length = *step;
  float *from = *map;
  if (room == length)
    return scratch;
#pragma omp parallel for schedule(static) if (g->batch * length >= PARALLEL_FROM)
  for (int64_t n = 0; n < g->batch; n++)
    memcpy(scratch + n * room, from + n * length, (size_t)length * sizeof *from);
  *map = scratch;
  *step = room;
  return scratch + g->batch * room;
}

/* What output (p, q) of image n and kernel row kh have to do with each other. */
typedef struct {
  float *x, *w, *y;
  int64_t w_step; /* from output channel to output channel */
  int64_t depth;  /* taps of the row that meet the map, times channels */
} position_row;

static position_row row_at(const images *m, int64_t n, int64_t p, int64_t q, int64_t kh) {
  const conv_geometry *g = m->c.g;
  conv_window down = conv_window_at(g, 0, p), across = conv_window_at(g, 1, q);
  int64_t h = down.at + (kh - down.first) * g->dilation[0];
  return (position_row){.x = m->c.x + n * m->x_step + (h * g->size[1] + across.at) * g->in,
                        .w = m->c.w + (kh * g->kernel[1] + across.first) * g->in,
                        .y = m->c.y + n * m->y_step + (p * g->result[1] + q) * g->out,
                        .w_step = pixels(g->kernel) * g->in,
                        .depth = (across.last - across.first) * g->in};
}

static device_status forward_at(const images *m, int64_t n, int64_t count, int64_t p, int64_t q) {
  const conv_geometry *g = m->c.g;
  conv_window down = conv_window_at(g, 0, p), across = conv_window_at(g, 1, q);
  bool empty = down.first == down.last || across.first == across.last;
  device_status status = DEVICE_DONE;
  float beta = 0;
  if (m->c.bias || empty) {
    set_rows(m->c.y + n * m->y_step + (p * g->result[1] + q) * g->out, count, g->out, m->y_step, m->c.bias);
    beta = 1;
  }
  for (int64_t kh = down.first; kh < down.last && !empty && status == DEVICE_DONE; kh++, beta = 1) {
    position_row r = row_at(m, n, p, q, kh);
    status = onednn_product(false, true, count, g->out, r.depth, r.x, m->x_step, r.w, r.w_step, beta, r.y, m->y_step);
  }
  return status;
}

static device_status forward_by_positions(const images *m, int64_t chunks) {
  const conv_geometry *g = m->c.g;
  int64_t each = divide_up(g->batch, chunks);
  device_status result = DEVICE_DONE;
#pragma omp parallel for collapse(3) schedule(dynamic)
  for (int64_t n = 0; n < g->batch; n += each)
    for (int64_t p = 0; p < g->result[0]; p++)
      for (int64_t q = 0; q < g->result[1]; q++)
        note(&result, forward_at(m, n, smaller(each, g->batch - n), p, q));
  return result;
}

/* Every output position adds to what its taps met. */
static device_status data_of_images(const images *m, int64_t n, int64_t count) {
  const conv_geometry *g = m->c.g;
  device_status status = DEVICE_DONE;
  memset(m->c.x + n * m->x_step, 0, (size_t)(count * m->x_step) * sizeof(float));
  for (int64_t p = 0; p < g->result[0]; p++)
    for (int64_t q = 0; q < g->result[1]; q++) {
      conv_window down = conv_window_at(g, 0, p);
      for (int64_t kh = down.first; kh < down.last && status == DEVICE_DONE; kh++) {
        position_row r = row_at(m, n, p, q, kh);
        status = onednn_product(false, false, count, r.depth, g->out, r.y, m->y_step, r.w, r.w_step, 1, r.x, m->x_step);
      }
    }
  return status;
}

static device_status data_by_positions(const images *m, int64_t chunks) {
  int64_t batch = m->c.g->batch, each = divide_up(batch, chunks);
  device_status result = DEVICE_DONE;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < batch; n += each)
    note(&result, data_of_images(m, n, smaller(each, batch - n)));
  return result;
}

/* Kernel row kh of `channels` output channels from o on: the sum over the positions whose window has that row. */
static device_status weight_of_row(const images *m, int64_t o, int64_t channels, int64_t kh) {
  const conv_geometry *g = m->c.g;
  int64_t line = g->kernel[1] * g->in, step = pixels(g->kernel) * g->in;
  device_status status = DEVICE_DONE;
  set_rows(m->c.w + o * step + kh * line, channels, line, step, NULL);
  for (int64_t p = 0; p < g->result[0]; p++) {
    conv_window down = conv_window_at(g, 0, p);
    for (int64_t q = 0; q < g->result[1] && kh >= down.first && kh < down.last && status == DEVICE_DONE; q++) {
      position_row r = row_at(m, 0, p, q, kh);
      status = onednn_product(true, false, channels, r.depth, g->batch, r.y + o, m->y_step, r.x, m->x_step, 1,
                              r.w + o * step, step);
    }
  }
  return status;
}

static device_status weight_by_positions(const images *m, int64_t chunks) {
  const conv_geometry *g = m->c.g;
  int64_t each = divide_up(g->out, chunks);
  device_status result = DEVICE_DONE;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t o = 0; o < g->out; o += each)
    for (int64_t kh = 0; kh < g->kernel[0]; kh++)
      note(&result, weight_of_row(m, o, smaller(each, g->out - o), kh));
  return result;
}

device_status conv_by_positions(conv_direction direction, const conv_operands *c, void *scratch) {
  images m = images_of(c);
  int64_t threads = omp_get_max_threads(), cut = direction == CONV_BACKWARD_WEIGHT ? c->g->out : c->g->batch;
  int64_t wanted = direction == CONV_FORWARD ? smaller(threads, divide_up(4 * threads, pixels(c->g->result))) : threads;
  int64_t chunks = larger(1, smaller(wanted, cut / LEAST_ROWS));
  switch (direction) {
  case CONV_FORWARD:
    return forward_by_positions(&m, chunks);
  case CONV_BACKWARD_DATA:
    return data_by_positions(&m, chunks);
  default:
    scratch = move_apart(c->g, &m.c.x, &m.x_step, scratch);
    move_apart(c->g, &m.c.y, &m.y_step, scratch);
    return weight_by_positions(&m, chunks);
  }
}

/* ---- by lowering: row (n, p, q) of the matrix holds (kh, kw, i) ---- */

/* Lines (n, p) of output pixels at a time, and the matrix's row length in memory. */
typedef struct {
  int64_t lines, chunk, depth, step;
  bool direct; /* a 1x1 of stride 1: the map is the matrix */
} lowering;

static lowering lowering_of(const conv_geometry *g) {
  lowering l = {.lines = g->batch * g->result[0], .depth = conv_depth(g)};
  l.direct = conv_is_matrix(g) && g->groups == 1;
  l.step = l.direct || l.depth % BAD_STEP ? l.depth : l.depth + GAP;
  int64_t most = larger(2, omp_get_max_threads()) * CHUNK / (l.step * g->result[1]);
  l.chunk = l.direct ? l.lines : smaller(l.lines, larger(1, most));
  return l;
}

size_t conv_lowered_scratch(const conv_geometry *g) {
  lowering l = lowering_of(g);
  return l.direct ? 0 : (size_t)(l.chunk * g->result[1] * l.step) * sizeof(float);
}

/* The patch under the kernel at one output, by kernel rows; zeros where it hangs over the edge. `element` is in bytes.
 */
static void gather_patch(const conv_geometry *g, int64_t element, conv_window down, conv_window across,
                         const char *image, char *row) {
  int64_t piece = g->in * element, line = g->kernel[1] * piece, pixel = g->groups * piece;
  bool together = g->groups == 1 && g->dilation[1] == 1;
  int64_t taps = across.last - across.first, runs = together ? taps > 0 : taps,
          length = together ? taps * piece : piece;
  memset(row, 0, (size_t)(down.first * line));
  memset(row + down.last * line, 0, (size_t)((g->kernel[0] - down.last) * line));
  for (int64_t kh = down.first; kh < down.last; kh++) {
    const char *from = image + ((down.at + (kh - down.first) * g->dilation[0]) * g->size[1] + across.at) * pixel;
    char *to = row + kh * line;
    memset(to, 0, (size_t)(across.first * piece));
    memset(to + across.last * piece, 0, (size_t)((g->kernel[1] - across.last) * piece));
    to += across.first * piece;
    for (int64_t r = 0; r < runs; r++, from += g->dilation[1] * pixel, to += piece)
      memcpy(to, from, (size_t)length);
  }
}

void conv_gather(const conv_geometry *g, size_t element, const void *x, int64_t first, int64_t last, int64_t step,
                 void *matrix) {
  int64_t width = g->result[1], depth = conv_depth(g), bytes = (int64_t)element;
  int64_t image = pixels(g->size) * g->groups * g->in * bytes;
#pragma omp parallel for schedule(static) if ((last - first) * width * depth >= PARALLEL_FROM)
  for (int64_t line = first; line < last; line++) {
    conv_window down = conv_window_at(g, 0, line % g->result[0]);
    char *rows = (char *)matrix + (line - first) * width * step * bytes;
    for (int64_t q = 0; q < width; q++)
      gather_patch(g, bytes, down, conv_window_at(g, 1, q), (const char *)x + line / g->result[0] * image,
                   rows + q * step * bytes);
  }
}

/* Adds one line of rows, the part of kernel row kh, to the line of the map that it met. */
static void scatter_line(const conv_geometry *g, const lowering *l, const float *rows, int64_t kh, float *line) {
  int64_t pixel = g->groups * g->in;
  for (int64_t q = 0; q < g->result[1]; q++) {
    conv_window across = conv_window_at(g, 1, q);
    const float *from = rows + q * l->step + (kh * g->kernel[1] + across.first) * g->in;
    float *to = line + across.at * pixel;
    bool together = g->groups == 1 && g->dilation[1] == 1;
    int64_t runs = together ? across.last > across.first : across.last - across.first;
    int64_t length = together ? (across.last - across.first) * g->in : g->in;
    for (int64_t r = 0; r < runs; r++, from += g->in, to += g->dilation[1] * pixel)
      for (int64_t i = 0; i < length; i++)
        to[i] += from[i];
  }
}

/* A line of the map is one task, so that no two threads add to it: those that lines first ... last-1 of the matrix met.
 */
static void scatter(const conv_geometry *g, const lowering *l, const float *matrix, int64_t first, int64_t last,
                    float *x) {
  int64_t image = first / g->result[0], end = (last - 1) / g->result[0] + 1, height = g->size[0];
#pragma omp parallel for schedule(static) if ((last - first) * g->result[1] * l->depth >= PARALLEL_FROM)
  for (int64_t task = 0; task < (end - image) * height; task++) {
    int64_t n = image + task / height, h = task % height;
    for (int64_t kh = 0; kh < g->kernel[0]; kh++) {
      int64_t steps = h + g->padding[0] - kh * g->dilation[0], p = steps / g->stride[0];
      int64_t line = n * g->result[0] + p;
      if (steps < 0 || steps % g->stride[0] || p >= g->result[0] || line < first || line >= last)
        continue;
      scatter_line(g, l, matrix + (line - first) * g->result[1] * l->step, kh,
                   x + (n * height + h) * g->size[1] * g->groups * g->in);
    }
  }
}

/* One group's lines first ... last-1 in one of the directions. */
static device_status lowered_lines(conv_direction direction, const conv_operands *c, const lowering *l, int64_t group,
                                   int64_t first, int64_t last, float *matrix) {
  const conv_geometry *g = c->g;
  int64_t rows = (last - first) * g->result[1], channels = g->groups * g->out;
  float *y = c->y + first * g->result[1] * channels + group * g->out, *w = c->w + group * g->out * l->depth;
  float *x = c->x + group * g->in;
  if (l->direct)
    matrix = x;
  else if (direction != CONV_BACKWARD_DATA)
    conv_gather(g, sizeof *x, x, first, last, l->step, matrix);
  if (direction == CONV_FORWARD)
    return cpu_product(false, true, rows, g->out, l->depth, matrix, l->step, w, l->depth, c->bias ? 1 : 0, y, channels);
  if (direction == CONV_BACKWARD_WEIGHT)
    return cpu_product(true, false, g->out, l->depth, rows, y, channels, matrix, l->step, first ? 1 : 0, w, l->depth);
  device_status status =
      cpu_product(false, false, rows, l->depth, g->out, y, channels, w, l->depth, 0, matrix, l->step);
  if (status == DEVICE_DONE && !l->direct)
    scatter(g, l, matrix, first, last, x);
  return status;
}

device_status conv_lowered(conv_direction direction, const conv_operands *c, void *scratch) {
  const conv_geometry *g = c->g;
  lowering l = lowering_of(g);
  int64_t image = pixels(g->size) * g->groups * g->in;
  device_status status = DEVICE_DONE;
  if (direction == CONV_BACKWARD_DATA && !l.direct) {
#pragma omp parallel for schedule(static) if (g->batch * image >= PARALLEL_FROM)
    for (int64_t n = 0; n < g->batch; n++)
      memset(c->x + n * image, 0, (size_t)image * sizeof(float));
  }
  for (int64_t first = 0; first < l.lines && status == DEVICE_DONE; first += l.chunk) {
    int64_t last = smaller(first + l.chunk, l.lines), channels = g->groups * g->out;
    if (direction == CONV_FORWARD && c->bias)
      set_rows(c->y + first * g->result[1] * channels, (last - first) * g->result[1], channels, channels, c->bias);
    for (int64_t group = 0; group < g->groups && status == DEVICE_DONE; group++)
      status = lowered_lines(direction, c, &l, group, first, last, scratch);
  }
  return status;
}

/* ---- strided points ---- */

void conv_take_points(const conv_geometry *g, size_t bytes, void *points, const void *x) {
  size_t pixel = (size_t)(g->groups * g->in) * bytes;
  int64_t lines = g->batch * g->result[0];
#pragma omp parallel for schedule(static) if ((int64_t)pixel * lines * g->result[1] >= PARALLEL_FROM)
  for (int64_t line = 0; line < lines; line++) {
    int64_t n = line / g->result[0], h = line % g->result[0] * g->stride[0] - g->padding[0];
    for (int64_t q = 0; q < g->result[1]; q++) {
      int64_t w = q * g->stride[1] - g->padding[1];
      char *to = (char *)points + (size_t)(line * g->result[1] + q) * pixel;
      if (h >= 0 && h < g->size[0] && w >= 0 && w < g->size[1])
        memcpy(to, (const char *)x + (size_t)((n * g->size[0] + h) * g->size[1] + w) * pixel, pixel);
      else
        memset(to, 0, pixel);
    }
  }
}

void conv_spread_points(const conv_geometry *g, size_t bytes, void *x, const void *points) {
  size_t pixel = (size_t)(g->groups * g->in) * bytes;
  int64_t lines = g->batch * g->size[0];
#pragma omp parallel for schedule(static) if ((int64_t)pixel * lines * g->size[1] >= PARALLEL_FROM)
  for (int64_t line = 0; line < lines; line++) {
    int64_t n = line / g->size[0], down = line % g->size[0] + g->padding[0], p = down / g->stride[0];
    char *to = (char *)x + (size_t)(line * g->size[1]) * pixel;
    memset(to, 0, (size_t)g->size[1] * pixel);
    if (down % g->stride[0] || p >= g->result[0])
      continue;
    for (int64_t q = 0; q < g->result[1]; q++) {
      int64_t w = q * g->stride[1] - g->padding[1];
      if (w >= 0 && w < g->size[1])
        memcpy(to + (size_t)w * pixel,
               (const char *)points + (size_t)((n * g->result[0] + p) * g->result[1] + q) * pixel, pixel);
    }
  }
}
