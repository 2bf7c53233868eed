/* winograd_forward.c: Winograd's convolution forward, and its data gradient, which is the same with the kernel turned.
 * With stride 2 four convolutions are added up, or turned each make every second pixel of an axis.
 *
 * A block of tiles is transformed, multiplied and transformed back before the next one, so that what stands between
 * stays in the second cache. Threads share out blocks; or, where these are few, output channels. Then a kernel that is
 * large and used once is transformed a row of elements and a panel at a time, just before it is multiplied, and is
 * nowhere in memory as a whole. Which it is changes no bit: blocks, and the chunks of moments that are made of them,
 * hang on sizes alone. */
#include <omp.h>

#include "cpu/kernels/product.h"
#include "cpu/kernels/winograd.h"

enum {
  FEW_CHANNELS = 128,     /* up to these a block is small, and its matrices stay in the second cache */
  SMALL_BLOCK = 28,       /* tiles */
  LARGE_BLOCK = 112,      /* so many that a kernel larger than the cache is worth reading */
  TOGETHER = 4,           /* panels whose sums of four phases are made before any is given */
  STREAMED_MAP = 1 << 22, /* bytes of a map that is written past the caches */
  LARGE_KERNEL = 1 << 22, /* bytes of a transformed kernel that goes past the caches, or is made by rows */
};

typedef struct {
  winograd_phase first_phase, last_phase; /* whose results are added */
  winograd_map x;
  winograd_result y;
  winograd_tiling tiling;
  const float *w;
  float *u;            /* transformed */
  bool is_transformed; /* already */
  int64_t w_out, w_in; /* of the kernel as it is stored */
  bool turned;
  int64_t out, panels, together;  /* panels; those whose sums are made before any is given */
  int64_t first;                  /* of the outputs in their map, in floats */
  int64_t tiles, blocks, chunks;  /* tiles of a block; chunks of moments */
  int64_t v_row, m_row, u_matrix; /* steps in floats */
  int64_t block_bytes;            /* of a block's description, for one phase */
  bool by_channels, by_rows;      /* the latter only with the former */
} forward_plan;

/* v and m of a phase, whose rows have `row` floats: from matrix to matrix; and where the first one begins, behind those
 * of the phases before. */
static int64_t matrix_step(const forward_plan *p, winograd_phase phase, int64_t row) {
  return winograd_most_rows(phase, p->tiles) * row + GAP;
}
static int64_t begin(const forward_plan *p, winograd_phase phase, int64_t row) {
  int64_t before = 0;
  for (winograd_phase k = p->first_phase; k < phase; k++)
    before += winograd_matrices(k) * matrix_step(p, k, row);
  return before;
}

/* The same of u, whose matrices are all alike. */
static int64_t u_begin(const forward_plan *p, winograd_phase phase) {
  int64_t before = 0;
  for (winograd_phase k = p->first_phase; k < phase; k++)
    before += winograd_matrices(k) * p->u_matrix;
  return before;
}

/* Floats of the pieces of scratch: the kernel, whole, or a row of a panel's for each thread; maps by blocks, or one for
 * each thread; sums, one for each thread, or by rows one for each of its blocks. */
static int64_t u_size(const forward_plan *p) {
  return whole_lines(u_begin(p, p->last_phase + 1));
}
static int64_t row_matrix(const forward_plan *p) {
  return PANEL * p->x.channels + GAP;
}
static int row_elements(winograd_phase phase) {
  return winograd_elements(winograd_taps_of(phase, 1));
}
static int64_t row_size(const forward_plan *p) {
  return whole_lines(row_elements(p->first_phase) * row_matrix(p));
}
static int64_t u_room(const forward_plan *p, int threads) {
  return p->by_rows ? threads * row_size(p) : u_size(p);
}
static int64_t v_size(const forward_plan *p) {
  return whole_lines(begin(p, p->last_phase + 1, p->v_row));
}
static int64_t m_size(const forward_plan *p) {
  return whole_lines(begin(p, p->last_phase + 1, p->m_row));
}

/* Bytes of a block's descriptions, one for each phase; and where they are. */
static int64_t description(const forward_plan *p) {
  return (p->last_phase - p->first_phase + 1) * p->block_bytes;
}
static winograd_block *of_phase(const forward_plan *p, char *block, winograd_phase phase) {
  return (winograd_block *)(block + (phase - p->first_phase) * p->block_bytes);
}

/* A phase of the data gradient with stride 2 makes every second pixel of an axis, from this one on. */
static int64_t first_pixel(const conv_geometry *g, winograd_phase phase, int axis) {
  return (g->padding[axis] + (winograd_taps_of(phase, axis) == MIDDLE_TAP)) % 2;
}

static void take_lattice(forward_plan *p, const conv_geometry *g) {
  p->first = first_pixel(g, p->first_phase, 0) * p->y.line + first_pixel(g, p->first_phase, 1) * p->y.step;
  for (int d = 0; d < 2; d++) {
    int64_t middle = winograd_taps_of(p->first_phase, d) == MIDDLE_TAP, first = first_pixel(g, p->first_phase, d);
    p->y.size[d] = (g->size[d] + 1 - first) / 2;
    p->x.padding[d] = !middle - (first + g->padding[d] - middle) / 2;
  }
  p->y.step *= 2;
  p->y.line *= 2;
}

/* Sizes of group 0; pointers are set later. `kept`: the transformed kernel is. */
static forward_plan make_plan(conv_direction direction, const conv_geometry *g, winograd_phase phase, int threads,
                              bool kept) {
  bool sums = direction == CONV_FORWARD && g->stride[0] == 2;
  bool turned = direction == CONV_BACKWARD_DATA;
  const int64_t *from = turned ? g->result : g->size, *to = turned ? g->size : g->result;
  forward_plan p = {.first_phase = phase,
                    .last_phase = sums ? MIDDLE_MIDDLE : phase,
                    .w_out = g->out,
                    .w_in = g->in,
                    .turned = turned,
                    .out = turned ? g->in : g->out};
  p.x = (winograd_map){.size = {from[0], from[1]}, .channels = turned ? g->out : g->in, .stride = sums ? 2 : 1};
  p.x.step = g->groups * p.x.channels;
  p.y = (winograd_result){.size = {to[0], to[1]}, .step = g->groups * p.out};
  p.y.line = to[1] * p.y.step;
  p.y.image = to[0] * p.y.line;
  for (int d = 0; d < 2; d++)
    p.x.padding[d] = turned ? 2 - g->padding[d] : g->padding[d];
  if (phase != WHOLE && !sums)
    take_lattice(&p, g);
  p.tiling = KERNEL(winograd_tiling_of)(g->batch, p.y.size);
  p.panels = divide_up(p.out, PANEL);

  int64_t most = larger(p.x.channels, p.out) <= FEW_CHANNELS ? SMALL_BLOCK : LARGE_BLOCK;
  p.blocks = divide_up(p.tiling.count, most);
  p.blocks += p.blocks % 2 && p.blocks > 1;
  p.tiles = divide_up(p.tiling.count, p.blocks);
  p.blocks = divide_up(p.tiling.count, p.tiles);
  p.chunks = smaller(p.blocks, moments_chunks(g->batch * pixels(p.y.size)));
  p.chunks = divide_up(p.blocks, divide_up(p.blocks, p.chunks));
  p.by_channels = p.chunks % threads != 0 && p.chunks < 4 * threads;

  p.together = sums ? smaller(p.panels, TOGETHER) : p.by_channels ? divide_up(p.panels, threads) : p.panels;
  p.v_row = divide_up(p.x.channels, LANES) * LANES + GAP;
  p.m_row = p.together * PANEL + GAP;
  p.u_matrix = p.panels * PANEL * p.x.channels + GAP;
  p.by_rows = p.by_channels && !kept && !sums && u_size(&p) * (int64_t)sizeof(float) >= LARGE_KERNEL;
  p.block_bytes = (int64_t)winograd_block_bytes(p.tiles);
  return p;
}

/* The phases that are made one after the other: those of the data gradient with stride 2; forward they are summed. */
static winograd_phase first_phase(const conv_geometry *g) {
  return g->stride[0] == 2 ? OUTER_OUTER : WHOLE;
}
static winograd_phase last_phase(conv_direction direction, const conv_geometry *g) {
  return g->stride[0] == 2 && direction == CONV_BACKWARD_DATA ? MIDDLE_MIDDLE : first_phase(g);
}

size_t KERNEL(winograd_packed)(const conv_geometry *g) {
  /* the kernel is the same for any number of threads */
  forward_plan p = make_plan(CONV_FORWARD, g, first_phase(g), 1, true);
  return (size_t)(g->groups * u_size(&p)) * sizeof(float);
}

/* Small maps have no pixel for some. */
static bool is_empty(conv_direction direction, const conv_geometry *g, winograd_phase phase) {
  bool empty = false;
  for (int d = 0; d < 2; d++)
    empty = empty || (phase != WHOLE && direction == CONV_BACKWARD_DATA && g->size[d] <= first_pixel(g, phase, d));
  return empty;
}

/* Enough with a kept kernel and without. */
size_t KERNEL(winograd_forward_scratch)(conv_direction direction, const conv_geometry *g, int threads) {
  size_t most = 0;
  for (winograd_phase phase = first_phase(g); phase <= last_phase(direction, g); phase++) {
    if (is_empty(direction, g, phase))
      continue;
    forward_plan p = make_plan(direction, g, phase, threads, false);
    int64_t vs = p.by_channels ? p.blocks : threads, ms = threads * (p.by_rows ? p.blocks : 1);
    size_t bytes = (size_t)(u_room(&p, threads) + vs * v_size(&p) + ms * m_size(&p)) * sizeof(float) +
                   (size_t)(vs * description(&p));
    most = bytes > most ? bytes : most;
  }
  return most;
}

static void count_pixels(const winograd_block *block, bool begins, int64_t channels, float *counts) {
  int64_t pixels_in_map = 0;
  for (int k = 0; k < block->count; k++)
    pixels_in_map += block->tiles[k].rows * block->tiles[k].columns;
  for (int64_t c = 0; c < channels; c++)
    counts[c] = (begins ? 0 : counts[c]) + (float)pixels_in_map;
}

/* m[e][row][column] of a block's tiles for elements first ... last-1 and `panels` panels. u begins with the first
 * element and panel. */
static void multiply(const forward_plan *p, const winograd_block *block, int first, int last, int64_t panel,
                     int64_t panels, const float *u, int64_t u_matrix, const float *v, float *m) {
  int64_t depth = p->x.channels;
  for (int e = first; e < last; e++) {
    int low, high;
    winograd_rows(block, e / row_elements(block->phase), e % row_elements(block->phase), &low, &high);
    for (int64_t k = 0; k < panels && high > low; k++)
      KERNEL(winograd_product)
    (false, high - low, depth, v + e * matrix_step(p, block->phase, p->v_row) + low * p->v_row, p->v_row,
     u + (e - first) * u_matrix + k * PANEL * depth, p->out - (panel + k) * PANEL,
     m + e * matrix_step(p, block->phase, p->m_row) + low * p->m_row + k * PANEL, p->m_row, false);
  }
}

/* The outputs of block k, of panels first ... last-1, from its sums, which begin with panel first. */
static void give(const forward_plan *p, char *block, int64_t k, int64_t first, int64_t last, const float *m) {
  int64_t channel = first * PANEL, columns = smaller(p->out, last * PANEL) - channel;
  winograd_part parts[PHASES];
  winograd_result y = p->y;
  int64_t of_chunk = divide_up(p->blocks, p->chunks);
  y.begins = k % of_chunk == 0;
  for (winograd_phase phase = p->first_phase; phase <= p->last_phase; phase++)
    parts[phase - p->first_phase] =
        (winograd_part){of_phase(p, block, phase), m + begin(p, phase, p->m_row), matrix_step(p, phase, p->m_row)};
  if (y.moments) {
    y.moments += k / of_chunk * 4 * y.moments_step;
    count_pixels(parts[0].block, y.begins, columns, y.moments + channel);
  }
  KERNEL(winograd_give)(&y, parts, p->last_phase > p->first_phase, channel, columns, p->m_row);
}

static void finish_block(const forward_plan *p, char *block, int64_t k, int64_t first, int64_t last, const float *v,
                         float *m) {
  for (int64_t panel = first, next; panel < last; panel = next) {
    next = smaller(panel + p->together, last);
    for (winograd_phase phase = p->first_phase; phase <= p->last_phase; phase++)
      multiply(p, of_phase(p, block, phase), 0, winograd_matrices(phase), panel, next - panel,
               p->u + u_begin(p, phase) + panel * PANEL * p->x.channels, p->u_matrix, v + begin(p, phase, p->v_row),
               m + begin(p, phase, p->m_row));
    give(p, block, k, panel, next, m);
  }
}

/* All blocks' outputs of panels first ... last-1, the kernel made by rows; m by blocks. */
static void finish_by_rows(const forward_plan *p, char *blocks, int64_t first, int64_t last, float *u, const float *vs,
                           float *m) {
  winograd_phase phase = p->first_phase;
  int width = row_elements(phase);
  for (int row = 0; row < winograd_matrices(phase) / width; row++)
    for (int64_t panel = first; panel < last; panel++) {
      KERNEL(winograd_take_kernel_row)(phase, p->w, p->w_out, p->w_in, p->turned, panel, row, u, row_matrix(p));
      for (int64_t k = 0; k < p->blocks; k++)
        multiply(p, of_phase(p, blocks + k * description(p), phase), row * width, (row + 1) * width, panel, 1, u,
                 row_matrix(p), vs + k * v_size(p), m + k * m_size(p) + (panel - first) * PANEL);
    }
  for (int64_t k = 0; k < p->blocks && last > first; k++)
    give(p, blocks + k * description(p), k, first, last, m + k * m_size(p));
}

static void take_kernel(const forward_plan *p, int64_t panel) {
  bool streams = STREAMS && u_size(p) * (int64_t)sizeof(float) >= LARGE_KERNEL;
  for (winograd_phase phase = p->first_phase; phase <= p->last_phase; phase++)
    KERNEL(winograd_take_kernel)
  (phase, p->w, p->w_out, p->w_in, p->turned, panel, p->u + u_begin(p, phase) + panel * PANEL * p->x.channels,
   p->u_matrix, streams);
}

/* A share of a block's tiles, whose descriptions were cut before. */
static void take_tiles(const forward_plan *p, char *description, int part, int parts, float *v) {
  bool sums = p->last_phase > p->first_phase;
  for (winograd_phase phase = p->first_phase; phase <= p->last_phase; phase++) {
    const winograd_block *block = of_phase(p, description, phase);
    winograd_map x = p->x;
    for (int d = 0; d < 2; d++)
      x.padding[d] -= sums && winograd_taps_of(phase, d) == MIDDLE_TAP;
    KERNEL(winograd_take)
    (&x, block, block->count * part / parts, block->count * (part + 1) / parts, v + begin(p, phase, p->v_row), p->v_row,
     matrix_step(p, phase, p->v_row));
  }
}

static void cut(const forward_plan *p, char *block, int64_t k) {
  for (winograd_phase phase = p->first_phase; phase <= p->last_phase; phase++)
    KERNEL(winograd_cut)(&p->tiling, phase, p->tiles, k, of_phase(p, block, phase));
}

static void run_group(const forward_plan *p, int threads, float *scratch) {
  float *vs = scratch, *ms = vs + (p->by_channels ? p->blocks : threads) * v_size(p);
  int64_t own_ms = p->by_rows ? p->blocks : 1;
  char *blocks = (char *)(ms + threads * own_ms * m_size(p));
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    float *m = ms + me * own_ms * m_size(p);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < (p->by_rows || p->is_transformed ? 0 : p->panels); panel++)
      take_kernel(p, panel);
    if (p->by_channels) {
      for (int64_t k = 0; k < p->blocks; k++) {
        char *block = blocks + k * description(p);
#pragma omp single
        cut(p, block, k);
        take_tiles(p, block, me, all, vs + k * v_size(p));
      }
#pragma omp barrier
      int64_t first = p->panels * me / all, last = p->panels * (me + 1) / all;
      if (p->by_rows)
        finish_by_rows(p, blocks, first, last, p->u + me * row_size(p), vs, m);
      for (int64_t k = 0; k < (p->by_rows ? 0 : p->blocks); k++)
        finish_block(p, blocks + k * description(p), k, first, last, vs + k * v_size(p), m);
    } else {
      char *block = blocks + me * description(p);
      float *v = vs + me * v_size(p);
      int64_t of_chunk = divide_up(p->blocks, p->chunks);
      for (int64_t k = p->chunks * me / all * of_chunk; k < smaller(p->blocks, p->chunks * (me + 1) / all * of_chunk);
           k++) {
        cut(p, block, k);
        take_tiles(p, block, 0, 1, v);
        finish_block(p, block, k, 0, p->panels, v, m);
      }
    }
    stream_end();
  }
}

static void run_phase(conv_direction direction, const winograd_operands *o, winograd_phase phase, int threads,
                      void *scratch) {
  const conv_geometry *g = o->g;
  forward_plan p = make_plan(direction, g, phase, threads, o->packed);
  const float *x = p.turned ? o->y : o->x, *bias = o->after.bias, *residual = o->after.residual;
  float *y = p.turned ? o->x : o->y, *u = o->packed ? o->packed->memory : scratch;
  p.x.relu = o->relu_x;
  p.y.relu = o->after.relu;
  p.y.moments_step = g->groups * p.out;
  p.y.streams = STREAMS && g->batch * p.y.image * (int64_t)sizeof(float) >= STREAMED_MAP && p.out % LANES == 0 &&
                (uintptr_t)y % sizeof(float_lanes) == 0;
  p.is_transformed = o->packed && o->packed->ready;
  if (o->moments) {
    int64_t left = moments_chunks(g->batch * pixels(p.y.size)) - p.chunks, size = 4 * p.y.moments_step;
    memset(o->moments + p.chunks * size, 0, (size_t)(left * size) * sizeof(float)); /* chunks of nothing */
  }
  for (int64_t k = 0; k < g->groups; k++) {
    p.x.data = x + k * p.x.channels;
    p.x.scale = o->scale ? o->scale + k * p.x.channels : NULL;
    p.x.shift = o->scale ? o->shift + k * p.x.channels : NULL;
    p.w = o->w + k * g->out * 9 * g->in;
    p.u = u + (o->packed ? k * u_size(&p) : 0);
    p.y.data = y + p.first + k * p.out;
    p.y.bias = bias ? bias + k * p.out : NULL;
    p.y.residual = residual ? residual + k * p.out : NULL;
    p.y.moments = o->moments ? o->moments + k * p.out : NULL;
    run_group(&p, threads, (float *)scratch + (o->packed ? 0 : u_room(&p, threads)));
  }
}

void KERNEL(winograd_forward)(conv_direction direction, const winograd_operands *o, int threads, void *scratch) {
  for (winograd_phase phase = first_phase(o->g); phase <= last_phase(direction, o->g); phase++)
    if (!is_empty(direction, o->g, phase))
      run_phase(direction, o, phase, threads, scratch);
}
