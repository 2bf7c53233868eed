/* winograd_weight.c: Winograd's gradient of the kernel: x and dy are transformed by tiles, and each of the 36 elements'
 * gradients (in x out) is a product over tiles.
 *
 * Where these 36 matrices are small, each thread adds up the tiles of its share into its own, a block of tiles at a
 * time, which stays in the second cache. Where they are large, all tiles are transformed first, and threads take
 * rectangles of the matrices, all 36 elements of one after the other, so that the matrices as a whole are nowhere in
 * memory.
 *
 * With stride 2 there are four such gradients, one for each pair of outer and middle taps: of different numbers of the
 * kernel. */
#include <omp.h>

#include "cpu/kernels/product.h"
#include "cpu/kernels/winograd.h"

enum {
  SMALL_SUMS = 1 << 23, /* bytes of the 36 matrices that a thread may have to itself */
  ALL_SUMS = 1 << 25,   /* and of those of all threads */
  MOST_MAPS = 1 << 26,  /* bytes of all tiles */
  BLOCK = 56,           /* tiles that are transformed at a time */
  RECTANGLE_IN = 64,    /* channels of a rectangle */
  RECTANGLE_OUT = 8 * PANEL,
};

typedef struct {
  winograd_map x, dy;
  winograd_tiling tiling;
  float *dw;
  int64_t in, out, panels, tiles, blocks;
  int64_t v_row, sum_matrix; /* steps in floats */
  int64_t v_size, z_size, sum_size, block_bytes;
  int64_t rows, columns; /* of a rectangle, columns in panels */
  bool by_tiles;
  winograd_phase first_phase, last_phase;
  int threads;
} weight_plan;

/* Steps from matrix to matrix, in floats. */
static int64_t v_matrix(const weight_plan *p, winograd_phase phase) {
  return winograd_most_rows(phase, p->tiles) * p->v_row + GAP;
}
static int64_t z_matrix(const weight_plan *p, winograd_phase phase) {
  return winograd_most_rows(phase, p->tiles) * p->panels * PANEL + GAP;
}

/* The matrices of sums of a phase stand behind those of the phases before it. */
static int64_t first_sum(const weight_plan *p, winograd_phase phase) {
  int64_t first = 0;
  for (winograd_phase k = p->first_phase; k < phase; k++)
    first += winograd_matrices(k);
  return first * p->sum_matrix;
}

static weight_plan make_plan(const conv_geometry *g, int threads) {
  weight_plan p = {.in = g->in, .out = g->out};
  p.x = (winograd_map){
      .size = {g->size[0], g->size[1]}, .channels = g->in, .step = g->groups * g->in, .stride = (int)g->stride[0]};
  p.dy = (winograd_map){.size = {g->result[0], g->result[1]}, .channels = g->out, .step = g->groups * g->out};
  for (int d = 0; d < 2; d++)
    p.x.padding[d] = g->padding[d];
  bool strided = g->stride[0] == 2;
  p.first_phase = strided ? OUTER_OUTER : WHOLE;
  p.last_phase = strided ? MIDDLE_MIDDLE : WHOLE;
  p.tiling = KERNEL(winograd_tiling_of)(g->batch, g->result);
  p.panels = divide_up(g->out, PANEL);
  int64_t sums = ELEMENTS * p.panels * PANEL * p.in * (int64_t)sizeof(float);
  int64_t maps = ELEMENTS * p.tiling.count * (p.in + p.out) * (int64_t)sizeof(float);
  p.by_tiles = (sums <= SMALL_SUMS && sums * threads <= ALL_SUMS) || maps > MOST_MAPS;
  p.rows = p.by_tiles ? p.in : smaller(p.in, RECTANGLE_IN);
  p.columns = p.by_tiles ? p.panels : smaller(p.panels, RECTANGLE_OUT / PANEL);

  p.threads = p.by_tiles ? (int)smaller(threads, p.tiling.count) : threads;
  p.tiles =
      p.by_tiles ? divide_up(p.tiling.count, p.threads * divide_up(p.tiling.count, BLOCK * p.threads)) : p.tiling.count;
  p.blocks = divide_up(p.tiling.count, p.tiles);
  p.threads = p.by_tiles ? (int)smaller(p.threads, p.blocks) : threads;
  p.v_row = divide_up(p.in, LANES) * LANES + GAP;
  p.sum_matrix = p.rows * p.columns * PANEL + GAP;
  p.v_size = whole_lines(winograd_matrices(p.first_phase) * v_matrix(&p, p.first_phase)); /* other phases have less */
  p.z_size = whole_lines(winograd_matrices(p.first_phase) * z_matrix(&p, p.first_phase));
  p.sum_size = whole_lines(ELEMENTS * p.sum_matrix);
  p.block_bytes = (int64_t)winograd_block_bytes(p.tiles);
  return p;
}

size_t KERNEL(winograd_weight_scratch)(const conv_geometry *g, int threads) {
  weight_plan p = make_plan(g, threads);
  int64_t maps = p.by_tiles ? p.threads : 1;
  return (size_t)(maps * (p.v_size + p.z_size) + p.threads * p.sum_size) * sizeof(float) +
         (size_t)(maps * p.block_bytes);
}

/* sums[e][panel][row][column] (+)= a block's products, for input channels `row` on and panels `panel` on. */
static void multiply_block(const weight_plan *p, const winograd_block *block, int64_t row, int64_t rows, int64_t panel,
                           int64_t panels, const float *v, const float *z, float *sums, bool add) {
  int width = winograd_elements(winograd_taps_of(block->phase, 1));
  int64_t all_rows = winograd_most_rows(block->phase, p->tiles);
  for (int e = 0; e < winograd_matrices(block->phase); e++) {
    int low, high;
    winograd_rows(block, e / width, e % width, &low, &high);
    for (int64_t k = 0; k < panels; k++) {
      KERNEL(winograd_product)
      (true, (int)rows, high - low, v + e * v_matrix(p, block->phase) + low * p->v_row + row, p->v_row,
       z + e * z_matrix(p, block->phase) + ((panel + k) * all_rows + low) * PANEL, p->out - (panel + k) * PANEL,
       sums + e * p->sum_matrix + k * p->rows * PANEL, PANEL, add);
    }
  }
}

/* Input channels row ... row+rows-1 and output channels of one panel, from the sums of `parts` threads. */
static void finish_panel(const weight_plan *p, winograd_phase phase, int64_t row, int64_t rows, int64_t panel,
                         const float *sums, int parts) {
  KERNEL(winograd_give_kernel)
  (phase, sums, PANEL, p->sum_matrix, parts, p->sum_size, rows, smaller(PANEL, p->out - panel * PANEL),
   p->dw + panel * PANEL * 9 * p->in + row, p->in);
}

/* v and z of the block's tiles first ... last-1. */
static void take_tiles(const weight_plan *p, const winograd_block *block, int64_t first, int64_t last, float *v,
                       float *z) {
  winograd_map x = p->x;
  for (int d = 0; d < 2; d++)
    x.padding[d] -= winograd_taps_of(block->phase, d) == MIDDLE_TAP;
  KERNEL(winograd_take)(&x, block, (int)first, (int)last, v, p->v_row, v_matrix(p, block->phase));
  KERNEL(winograd_take_gradient)
  (&p->dy, block, (int)first, (int)last, z, winograd_most_rows(block->phase, p->tiles), z_matrix(p, block->phase));
}

static void run_by_tiles(const weight_plan *p, float *scratch) {
  int threads = p->threads;
  float *vs = scratch, *zs = vs + threads * p->v_size, *all_sums = zs + threads * p->z_size;
  char *blocks = (char *)(all_sums + threads * p->sum_size);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    winograd_block *block = (winograd_block *)(blocks + me * p->block_bytes);
    float *v = vs + me * p->v_size, *z = zs + me * p->z_size, *sums = all_sums + me * p->sum_size;
    int64_t begin = p->blocks * me / all, end = p->blocks * (me + 1) / all;
    for (int64_t k = begin; k < end; k++) {
      for (winograd_phase phase = p->first_phase; phase <= p->last_phase; phase++) {
        KERNEL(winograd_cut)(&p->tiling, phase, p->tiles, k, block);
        take_tiles(p, block, 0, block->count, v, z);
        multiply_block(p, block, 0, p->in, 0, p->panels, v, z, sums + first_sum(p, phase), k > begin);
      }
    }
#pragma omp barrier
#pragma omp for schedule(static) collapse(2)
    for (int64_t panel = 0; panel < p->panels; panel++)
      for (int64_t row = 0; row < p->in; row += LANES)
        for (winograd_phase phase = p->first_phase; phase <= p->last_phase; phase++)
          finish_panel(p, phase, row, smaller(LANES, p->in - row), panel,
                       all_sums + first_sum(p, phase) + (panel * p->rows + row) * PANEL, all);
  }
}

static void run_by_channels(const weight_plan *p, float *scratch) {
  int threads = p->threads;
  float *v = scratch, *z = v + p->v_size, *all_sums = z + p->z_size;
  winograd_block *block = (winograd_block *)(all_sums + threads * p->sum_size);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    float *sums = all_sums + me * p->sum_size;
    for (winograd_phase phase = p->first_phase; phase <= p->last_phase; phase++) {
#pragma omp single
      KERNEL(winograd_cut)(&p->tiling, phase, p->tiles, 0, block);
      take_tiles(p, block, (int64_t)block->count * me / all, (int64_t)block->count * (me + 1) / all, v, z);
#pragma omp barrier
#pragma omp for schedule(static) collapse(2)
      for (int64_t panel = 0; panel < p->panels; panel += p->columns)
        for (int64_t row = 0; row < p->in; row += p->rows) {
          int64_t rows = smaller(p->rows, p->in - row), panels = smaller(p->columns, p->panels - panel);
          multiply_block(p, block, row, rows, panel, panels, v, z, sums, false);
          for (int64_t k = 0; k < panels; k++)
            finish_panel(p, phase, row, rows, panel + k, sums + k * p->rows * PANEL, 1);
        }
    }
  }
}

void KERNEL(winograd_weight)(const winograd_operands *o, int threads, void *scratch) {
  const conv_geometry *g = o->g;
  weight_plan p = make_plan(g, threads);
  p.x.relu = o->relu_x;
  for (int64_t k = 0; k < g->groups; k++) {
    p.x.data = o->x + k * g->in;
    p.x.scale = o->scale ? o->scale + k * g->in : NULL;
    p.x.shift = o->scale ? o->shift + k * g->in : NULL;
    p.dy.data = o->y + k * g->out;
    p.dw = o->w + k * g->out * 9 * g->in;
    (p.by_tiles ? run_by_tiles : run_by_channels)(&p, scratch);
  }
}
