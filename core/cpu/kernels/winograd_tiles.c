/* winograd_tiles.c: maps cut into tiles, and the transforms of tiles: maps to elements, elements to maps. */
#include "cpu/kernels/product.h"
#include "cpu/kernels/winograd_strided.h"

/* ---- cutting ---- */

/* As few elements as possible. */
static winograd_axis cut_axis(int64_t size) {
  winograd_axis best = {0, 0};
  int64_t least = INT64_MAX;
  for (int64_t threes = 0; threes < 4; threes++) {
    int64_t left = size - 3 * threes, fours = left > 0 ? (left + 3) / 4 : 0, elements = 6 * fours + 5 * threes;
    if (elements < least) {
      least = elements;
      best = (winograd_axis){fours, threes};
    }
  }
  return best;
}

winograd_tiling KERNEL(winograd_tiling_of)(int64_t batch, const int64_t size[2]) {
  winograd_tiling t = {.size = {size[0], size[1]}, .axis = {cut_axis(size[0]), cut_axis(size[1])}, .count = batch};
  for (int d = 0; d < 2; d++)
    t.count *= t.axis[d].fours + t.axis[d].threes;
  return t;
}

/* Where tile k of an axis begins; how many outputs it has in the map. */
static int64_t place(const winograd_axis *a, int64_t k, int64_t size, uint8_t *is_short, uint8_t *outputs) {
  int64_t start = k < a->fours ? 4 * k : a->fours + 3 * k, left = size - start, most = k < a->fours ? 4 : 3;
  *is_short = k >= a->fours;
  *outputs = (uint8_t)(left < most ? left : most);
  return start;
}

void KERNEL(winograd_cut)(const winograd_tiling *tiling, winograd_phase phase, int64_t tiles, int64_t number,
                          winograd_block *block) {
  int64_t first = number * tiles, count = smaller(tiles, tiling->count - first);
  static const int group_of[2][2] = {{1, 0}, {2, 3}}; /* [short_y][short_x] */
  const winograd_taps of_y = winograd_taps_of(phase, 0), of_x = winograd_taps_of(phase, 1);
  int64_t across = tiling->axis[1].fours + tiling->axis[1].threes,
          down = tiling->axis[0].fours + tiling->axis[0].threes;
  int64_t image = first / (down * across), y = first / across % down, x = first % across;
  int counts[4] = {0};
  block->phase = phase;
  block->count = (int)count;
  for (int64_t k = 0; k < count; k++) {
    winograd_tile *t = &block->tiles[k];
    t->image = image;
    t->y = place(&tiling->axis[0], y, tiling->size[0], &t->short_y, &t->rows);
    t->x = place(&tiling->axis[1], x, tiling->size[1], &t->short_x, &t->columns);
    int *of_group = &counts[group_of[t->short_y][t->short_x]];
    t->row = *of_group;
    *of_group += winograd_positions(of_y, t->short_y) * winograd_positions(of_x, t->short_x);
    if (++x == across) {
      x = 0;
      if (++y == down) {
        y = 0;
        image++;
      }
    }
  }
  block->start[0] = 0;
  for (int g = 0; g < 4; g++)
    block->start[g + 1] = block->start[g] + counts[g];
  for (int64_t k = 0; k < count; k++)
    block->tiles[k].row += block->start[group_of[block->tiles[k].short_y][block->tiles[k].short_x]];
}

/* Calls form(short_y, short_x, ...) with constants. */
#define OF_KIND(tile, form, ...)                                                                                       \
  switch (2 * (tile)->short_y + (tile)->short_x) {                                                                     \
  case 0:                                                                                                              \
    form(false, false, __VA_ARGS__);                                                                                   \
    break;                                                                                                             \
  case 1:                                                                                                              \
    form(false, true, __VA_ARGS__);                                                                                    \
    break;                                                                                                             \
  case 2:                                                                                                              \
    form(true, false, __VA_ARGS__);                                                                                    \
    break;                                                                                                             \
  default:                                                                                                             \
    form(true, true, __VA_ARGS__);                                                                                     \
  }

static inline int64_t lanes_left(int64_t channels, int64_t c) {
  return channels - c < LANES ? channels - c : LANES;
}

/* ---- maps to elements ---- */

/* Offsets of a tile's inputs in the map, -1 outside; whether all are inside. */
static ALWAYS_INLINE bool offsets_of(const winograd_phase phase, const winograd_map *x, const winograd_tile *t,
                                     const int rows, const int columns, int64_t *offset) {
  const int side = winograd_inputs(winograd_taps_of(phase, 1));
  int64_t stride = x->stride, top = stride * t->y - x->padding[0], left = stride * t->x - x->padding[1];
  for (int r = 0; r < rows; r++)
    for (int s = 0; s < columns; s++) {
      int64_t row = top + stride * r, column = left + stride * s;
      bool inside = row >= 0 && row < x->size[0] && column >= 0 && column < x->size[1];
      offset[r * side + s] = inside ? ((t->image * x->size[0] + row) * x->size[1] + column) * x->step : -1;
    }
  return top >= 0 && left >= 0 && top + stride * (rows - 1) < x->size[0] && left + stride * (columns - 1) < x->size[1];
}

static ALWAYS_INLINE float_lanes changed(float_lanes value, float_lanes scale, float_lanes shift, bool relu) {
  value = multiply_add_lanes(scale, value, shift);
  return relu ? relu_lanes(value) : value;
}

/* Inputs to elements, or gradients of outputs to elements, along an axis. */
typedef void transform(const bool is_short, const float_lanes *d, const int step, float_lanes *o, const int to);

static ALWAYS_INLINE transform *in_of(const winograd_taps taps) {
  return taps == ALL_TAPS ? winograd_in : taps == OUTER_TAPS ? outer_in : middle_same;
}
static ALWAYS_INLINE transform *out_turned_of(const winograd_taps taps) {
  return taps == ALL_TAPS ? winograd_out_turned : taps == OUTER_TAPS ? outer_out_turned : middle_same;
}

/* Where element or position p of an axis stands; whether there is none in a short tile. */
static ALWAYS_INLINE int64_t place_of(const winograd_taps taps, const int p, int64_t matrix_step, int64_t row_step) {
  return p * (taps == MIDDLE_TAP ? row_step : matrix_step);
}
static ALWAYS_INLINE bool lacks(const winograd_taps taps, const bool is_short, const int p) {
  return is_short && p == (taps == MIDDLE_TAP ? 3 : 4);
}

static ALWAYS_INLINE void store_elements(const bool short_y, const bool short_x, const winograd_phase phase,
                                         const float_lanes *columns_done, float *v, int64_t row_step,
                                         int64_t matrix_step, transform *along, const int step) {
  const winograd_taps of_y = winograd_taps_of(phase, 0), of_x = winograd_taps_of(phase, 1);
  const int height = winograd_inputs(of_y), width = winograd_inputs(of_x);
  const int64_t matrices = winograd_elements(of_x) * matrix_step, rows = winograd_positions(of_x, short_x) * row_step;
#pragma GCC unroll 6
  for (int p = 0; p < height; p++) {
    float_lanes o[SIDE];
    if (lacks(of_y, short_y, p))
      continue;
    along(short_x, columns_done + p * step, 1, o, 1);
#pragma GCC unroll 6
    for (int q = 0; q < width; q++)
      if (!lacks(of_x, short_x, q))
        store_lanes(v, place_of(of_y, p, matrices, rows) + place_of(of_x, q, matrix_step, row_step), o[q], false);
  }
}

static ALWAYS_INLINE void take_tile(const bool short_y, const bool short_x, const winograd_phase phase,
                                    const winograd_map *x, const winograd_tile *t, float *v, int64_t row_step,
                                    int64_t matrix_step, const bool changes) {
  const winograd_taps of_y = winograd_taps_of(phase, 0), of_x = winograd_taps_of(phase, 1);
  const int side = winograd_inputs(of_x), rows = winograd_inputs(of_y) - short_y, columns = side - short_x;
  int64_t offset[ELEMENTS];
  bool inside = offsets_of(phase, x, t, rows, columns, offset);
  for (int64_t c = 0; c < x->channels; c += LANES) {
    float_lanes d[ELEMENTS], done[ELEMENTS], scale = {0}, shift = {0};
    int64_t count = lanes_left(x->channels, c);
    if (changes) {
      scale = load_first_lanes(x->scale + c, count);
      shift = load_first_lanes(x->shift + c, count);
    }
    if (inside && count == LANES) {
      const float *first = x->data + offset[0] + c;
      int64_t step = x->stride * x->step, line = step * x->size[1];
#pragma GCC unroll 6
      for (int r = 0; r < rows; r++)
#pragma GCC unroll 6
        for (int s = 0; s < columns; s++) {
          float_lanes value = load_lanes(first, r * line + s * step, false);
          d[r * side + s] = changes ? changed(value, scale, shift, x->relu) : value;
        }
    } else {
#pragma GCC unroll 6
      for (int r = 0; r < rows; r++)
#pragma GCC unroll 6
        for (int s = 0; s < columns; s++) {
          int64_t at = offset[r * side + s];
          float_lanes value = {0};
          if (at >= 0) {
            value = count == LANES ? load_lanes(x->data, at + c, false) : load_first_lanes(x->data + at + c, count);
            if (changes)
              value = changed(value, scale, shift, x->relu);
          }
          d[r * side + s] = value;
        }
    }
#pragma GCC unroll 6
    for (int s = 0; s < columns; s++)
      in_of(of_y)(short_y, d + s, side, done + s, side);
    store_elements(short_y, short_x, phase, done, v + c, row_step, matrix_step, in_of(of_x), side);
  }
}

#define TAKE(name, phase, changes)                                                                                     \
  static __attribute__((noinline)) void name(const winograd_map *x, const winograd_tile *t, float *v,                  \
                                             int64_t row_step, int64_t matrix_step) {                                  \
    OF_KIND(t, take_tile, phase, x, t, v, row_step, matrix_step, changes)                                              \
  }
#define TAKE_PHASE(phase)                                                                                              \
  TAKE(take_plain_##phase, phase, false)                                                                               \
  TAKE(take_changed_##phase, phase, WINOGRAD_ROUNDS_ONCE) /* else nothing is asked for */
TAKE_PHASE(WHOLE)
TAKE_PHASE(OUTER_OUTER)
TAKE_PHASE(OUTER_MIDDLE)
TAKE_PHASE(MIDDLE_OUTER)
TAKE_PHASE(MIDDLE_MIDDLE)

void KERNEL(winograd_take)(const winograd_map *x, const winograd_block *block, int first, int last, float *v,
                           int64_t row_step, int64_t matrix_step) {
  static __typeof__(take_plain_WHOLE) *const forms[PHASES][2] = {
      [WHOLE] = {take_plain_WHOLE, take_changed_WHOLE},
      [OUTER_OUTER] = {take_plain_OUTER_OUTER, take_changed_OUTER_OUTER},
      [OUTER_MIDDLE] = {take_plain_OUTER_MIDDLE, take_changed_OUTER_MIDDLE},
      [MIDDLE_OUTER] = {take_plain_MIDDLE_OUTER, take_changed_MIDDLE_OUTER},
      [MIDDLE_MIDDLE] = {take_plain_MIDDLE_MIDDLE, take_changed_MIDDLE_MIDDLE},
  };
  for (int k = first; k < last; k++)
    forms[block->phase][x->scale != NULL](x, &block->tiles[k], v + block->tiles[k].row * row_step, row_step,
                                          matrix_step);
}

/* ---- gradients of outputs to elements ---- */

static ALWAYS_INLINE void take_gradient_tile(const bool short_y, const bool short_x, const winograd_phase phase,
                                             const winograd_map *dy, const winograd_tile *t, float *z, int64_t rows,
                                             int64_t matrix_step) {
  const winograd_taps of_y = winograd_taps_of(phase, 0), of_x = winograd_taps_of(phase, 1);
  const int height = 4 - short_y, width = 4 - short_x;
  bool whole = t->rows == height && t->columns == width;
  const float *first = dy->data + ((t->image * dy->size[0] + t->y) * dy->size[1] + t->x) * dy->step;
  int64_t line = dy->size[1] * dy->step;
  for (int64_t c = 0; c < dy->channels; c += LANES) {
    float_lanes d[16], done[SIDE * 4];
    int64_t count = lanes_left(dy->channels, c);
#pragma GCC unroll 4
    for (int r = 0; r < height; r++)
#pragma GCC unroll 4
      for (int s = 0; s < width; s++) {
        const float *from = first + r * line + s * dy->step + c;
        d[r * 4 + s] = !whole && (r >= t->rows || s >= t->columns) ? (float_lanes){0}
                       : count == LANES                            ? load_lanes(from, 0, false)
                                                                   : load_first_lanes(from, count);
      }
#pragma GCC unroll 4
    for (int s = 0; s < width; s++)
      out_turned_of(of_y)(short_y, d + s, 4, done + s, 4);
    store_elements(short_y, short_x, phase, done, z + (c / PANEL * rows) * PANEL + c % PANEL, PANEL, matrix_step,
                   out_turned_of(of_x), 4);
  }
}

#define TAKE_GRADIENT(phase)                                                                                           \
  static __attribute__((noinline)) void take_gradient_##phase(const winograd_map *dy, const winograd_tile *t,          \
                                                              float *z, int64_t rows, int64_t matrix_step) {           \
    OF_KIND(t, take_gradient_tile, phase, dy, t, z, rows, matrix_step)                                                 \
  }
TAKE_GRADIENT(WHOLE)
TAKE_GRADIENT(OUTER_OUTER)
TAKE_GRADIENT(OUTER_MIDDLE)
TAKE_GRADIENT(MIDDLE_OUTER)
TAKE_GRADIENT(MIDDLE_MIDDLE)

void KERNEL(winograd_take_gradient)(const winograd_map *dy, const winograd_block *block, int first, int last, float *z,
                                    int64_t rows, int64_t matrix_step) {
  static __typeof__(take_gradient_WHOLE) *const forms[PHASES] = {
      [WHOLE] = take_gradient_WHOLE,
      [OUTER_OUTER] = take_gradient_OUTER_OUTER,
      [OUTER_MIDDLE] = take_gradient_OUTER_MIDDLE,
      [MIDDLE_OUTER] = take_gradient_MIDDLE_OUTER,
      [MIDDLE_MIDDLE] = take_gradient_MIDDLE_MIDDLE,
  };
  for (int k = first; k < last; k++)
    forms[block->phase](dy, &block->tiles[k], z + (int64_t)block->tiles[k].row * PANEL, rows, matrix_step);
}

/* ---- elements to maps ---- */

/* Adds a tile's outputs to the chunk's moments; the first tile chooses the pivots. */
static ALWAYS_INLINE void measure(const winograd_result *y, const bool begins, const int rows, const int columns,
                                  const winograd_tile *t, const float_lanes *o, int64_t c, int64_t count) {
  float *pivots = y->moments + y->moments_step + c, *sums = pivots + y->moments_step, *squares = sums + y->moments_step;
  float_lanes pivot, sum = {0}, square = {0};
  if (begins) {
    pivot = (float_lanes){0};
    for (int r = 0; r < t->rows; r++)
      for (int s = 0; s < t->columns; s++)
        pivot += o[r * 4 + s];
    pivot *= 1 / (float)(t->rows * t->columns);
    store_first_lanes(pivots, pivot, count);
  } else {
    pivot = load_first_lanes(pivots, count);
    sum = load_first_lanes(sums, count);
    square = load_first_lanes(squares, count);
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int s = 0; s < columns; s++)
      if (r < t->rows && s < t->columns) {
        float_lanes difference = o[r * 4 + s] - pivot;
        sum += difference;
        square += difference * difference;
      }
  store_first_lanes(sums, sum, count);
  store_first_lanes(squares, square, count);
}

static ALWAYS_INLINE transform *out_of(const winograd_taps taps) {
  return taps == ALL_TAPS ? winograd_out : taps == OUTER_TAPS ? outer_out : middle_same;
}

/* o (4x4) of LANES channels. */
static ALWAYS_INLINE void outputs_of(const bool short_y, const bool short_x, const winograd_phase phase, const float *m,
                                     int64_t row_step, int64_t matrix_step, float_lanes *o) {
  const winograd_taps of_y = winograd_taps_of(phase, 0), of_x = winograd_taps_of(phase, 1);
  const int height = winograd_inputs(of_y), width = winograd_inputs(of_x);
  const int64_t matrices = winograd_elements(of_x) * matrix_step, rows = winograd_positions(of_x, short_x) * row_step;
  float_lanes e[ELEMENTS], done[4 * SIDE];
#pragma GCC unroll 6
  for (int p = 0; p < height; p++)
#pragma GCC unroll 6
    for (int q = 0; q < width; q++)
      if (!lacks(of_y, short_y, p) && !lacks(of_x, short_x, q)) {
        int64_t at = place_of(of_y, p, matrices, rows) + place_of(of_x, q, matrix_step, row_step);
        e[p * width + q] = load_lanes(m, at, false);
      }
#pragma GCC unroll 6
  for (int q = 0; q < width; q++)
    if (!lacks(of_x, short_x, q))
      out_of(of_y)(short_y, e + q, width, done + q, width);
#pragma GCC unroll 4
  for (int r = 0; r < 4 - short_y; r++)
    out_of(of_x)(short_x, done + r * width, 1, o + r * 4, 1);
}

/* Those of another phase for tile number `tile` of the block. */
static ALWAYS_INLINE void add_outputs(const bool short_y, const bool short_x, const winograd_phase phase,
                                      const winograd_part *part, int tile, int64_t row_step, int64_t c,
                                      float_lanes *o) {
  float_lanes more[16];
  outputs_of(short_y, short_x, phase, part->m + part->block->tiles[tile].row * row_step + c, row_step,
             part->matrix_step, more);
#pragma GCC unroll 4
  for (int r = 0; r < 4 - short_y; r++)
#pragma GCC unroll 4
    for (int s = 0; s < 4 - short_x; s++)
      o[r * 4 + s] += more[r * 4 + s];
}

static ALWAYS_INLINE void give_tile(const bool short_y, const bool short_x, const winograd_phase phase,
                                    const winograd_result *y, const winograd_part *parts, int tile, const bool sums,
                                    int64_t first, int64_t channels, int64_t row_step, const bool plain) {
  const winograd_tile *t = &parts->block->tiles[tile];
  const int rows = 4 - short_y, columns = 4 - short_x;
  bool whole = t->rows == rows && t->columns == columns, begins = y->begins && tile == 0;
  int64_t line = y->line, offset = t->image * y->image + t->y * y->line + t->x * y->step + first;
  for (int64_t c = 0; c < channels; c += LANES) {
    float_lanes o[16];
    int64_t count = lanes_left(channels, c);
    outputs_of(short_y, short_x, phase, parts->m + t->row * row_step + c, row_step, parts->matrix_step, o);
    if (sums) {
      add_outputs(short_y, short_x, OUTER_MIDDLE, parts + 1, tile, row_step, c, o);
      add_outputs(short_y, short_x, MIDDLE_OUTER, parts + 2, tile, row_step, c, o);
      add_outputs(short_y, short_x, MIDDLE_MIDDLE, parts + 3, tile, row_step, c, o);
    }
    float_lanes bias = !plain && y->bias ? load_first_lanes(y->bias + first + c, count) : (float_lanes){0};
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int s = 0; s < columns; s++)
        if (whole || (r < t->rows && s < t->columns)) {
          int64_t at = offset + r * line + s * y->step + c;
          float_lanes value = o[r * 4 + s];
          if (!plain) {
            value += bias;
            if (y->residual)
              value += load_first_lanes(y->residual + at, count);
            if (y->relu)
              value = relu_lanes(value);
            o[r * 4 + s] = value;
          }
          if (y->streams)
            stream_lanes(y->data + at, value);
          else if (count == LANES)
            store_lanes(y->data, at, value, false);
          else
            store_first_lanes(y->data + at, value, count);
        }
    if ((sums || phase == WHOLE) && y->moments) /* of gradients none are wanted */
      measure(y, begins, rows, columns, t, o, first + c, count);
  }
}

#define GIVE(name, phase, sums, plain)                                                                                 \
  static __attribute__((noinline)) void name(const winograd_result *y, const winograd_part *parts, int tile,           \
                                             int64_t first, int64_t channels, int64_t row_step) {                      \
    OF_KIND(&parts->block->tiles[tile], give_tile, phase, y, parts, tile, sums, first, channels, row_step, plain)      \
  }
GIVE(give_changed, WHOLE, false, false)
GIVE(give_sum, OUTER_OUTER, true, false)
GIVE(give_plain_WHOLE, WHOLE, false, true)
GIVE(give_plain_OUTER_OUTER, OUTER_OUTER, false, true)
GIVE(give_plain_OUTER_MIDDLE, OUTER_MIDDLE, false, true)
GIVE(give_plain_MIDDLE_OUTER, MIDDLE_OUTER, false, true)
GIVE(give_plain_MIDDLE_MIDDLE, MIDDLE_MIDDLE, false, true)

void KERNEL(winograd_give)(const winograd_result *y, const winograd_part *parts, bool sums, int64_t first,
                           int64_t count, int64_t row_step) {
  static __typeof__(give_changed) *const plain[PHASES] = {
      [WHOLE] = give_plain_WHOLE,
      [OUTER_OUTER] = give_plain_OUTER_OUTER,
      [OUTER_MIDDLE] = give_plain_OUTER_MIDDLE,
      [MIDDLE_OUTER] = give_plain_MIDDLE_OUTER,
      [MIDDLE_MIDDLE] = give_plain_MIDDLE_MIDDLE,
  };
  bool changes = y->bias || y->residual || y->relu;
  __typeof__(give_changed) *form = sums ? give_sum : changes ? give_changed : plain[parts->block->phase];
  for (int k = 0; k < parts->block->count; k++)
    form(y, parts, k, first, count, row_step);
}
