/* pool.c: maximum and average over windows of channels-last maps. Vectors run along the channels and stay in registers
 * while a window is gone through; backward gathers for each element of the input from the windows over it, so that
 * every element is written once, by one thread, its terms added in one order. */
#include <math.h>

#include "cpu/kernels/channels.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/lanes.h"
#include "cpu/kernels/pool.h"

enum {
  BLOCK = 4,             /* vectors that are kept in registers together */
  PARALLEL_FROM = 32768, /* elements of the input */
};

/* ---- windows along one axis ---- */

/* What window `output` takes of the map. */
static pool_span window_of(const device_windows *windows, int axis, int64_t output, int64_t outputs, int64_t size) {
  const orepa_pool *pool = &windows->pool;
  pool_span window = {.step = 1};
  if (windows->adaptive) {
    window.first = output * size / outputs;
    window.end = ((output + 1) * size + outputs - 1) / outputs;
    window.divisor = window.end - window.first;
  } else {
    int64_t step = pool->dilation[axis], first = output * pool->stride[axis] - pool->padding[axis];
    int64_t end = first + (pool->kernel[axis] - 1) * step + 1, padded = size + pool->padding[axis];
    window.step = step;
    window.first = first < 0 ? first + (step - 1 - first) / step * step : first;
    window.end = end < size ? end : size;
    int64_t length = pool->count_padding ? (end < padded ? end : padded) - first : window.end - window.first;
    window.divisor = length > 0 ? (length + step - 1) / step : 0;
  }
  window.share = window.divisor > 0 ? 1 / (float)window.divisor : 0;
  return window;
}

/* The windows that can take a position, and with dilation some that step over it. */
static pool_span windows_over(const device_windows *windows, int axis, int64_t position, int64_t outputs,
                              int64_t size) {
  const orepa_pool *pool = &windows->pool;
  pool_span over = {.step = 1};
  if (windows->adaptive) {
    over.first = position * outputs / size;
    over.end = ((position + 1) * outputs + size - 1) / size;
    return over;
  }
  int64_t stride = pool->stride[axis], last = position + pool->padding[axis];
  int64_t before = last - (pool->kernel[axis] - 1) * pool->dilation[axis];
  over.first = before > 0 ? (before + stride - 1) / stride : 0;
  over.end = last / stride + 1 < outputs ? last / stride + 1 : outputs;
  return over;
}

/* ---- plan: all windows of a map, worked out once ---- */

static size_t spans_of(const device_array *y, const device_array *x) {
  return (size_t)(y->shape[2] + y->shape[3] + x->shape[2] + x->shape[3]);
}

size_t KERNEL(pool_plan_bytes)(const device_array *y, const device_array *x) {
  return spans_of(y, x) * sizeof(pool_span);
}

pool_plan KERNEL(pool_plan_in)(void *memory, const device_windows *windows, const device_array *y,
                               const device_array *x) {
  int64_t height = x->shape[2], width = x->shape[3], rows = y->shape[2], columns = y->shape[3];
  pool_span *span = memory;
  pool_plan plan = {x->shape[0],
                    x->shape[1],
                    height,
                    width,
                    rows,
                    columns,
                    span,
                    span + rows,
                    span + rows + columns,
                    span + rows + columns + height,
                    x->dtype == OREPA_BFLOAT16};
  for (int64_t p = 0; p < rows; p++)
    plan.row[p] = window_of(windows, 0, p, rows, height);
  for (int64_t q = 0; q < columns; q++)
    plan.column[q] = window_of(windows, 1, q, columns, width);
  for (int64_t h = 0; h < height; h++)
    plan.over_row[h] = windows_over(windows, 0, h, rows, height);
  for (int64_t w = 0; w < width; w++)
    plan.over_column[w] = windows_over(windows, 1, w, columns, width);
  return plan;
}

/* ---- passes ---- */

/* An element of the map that is written, and what it reads: forward a window, backward the windows over it. */
typedef struct {
  const pool_plan *plan;
  const void *from;
  void *into;
  int32_t *indices;
  const float *scale, *shift; /* (C), of the prologue; NULL: none */
  bool relu;
  int64_t image, h, w, to; /* channel 0 of it is element `to` */
  pool_span row, column;
} pool_element;

/* What a pass does for `vectors` vectors of channels from c on; of a single vector only `lanes` lanes may count.
 * Inlined with constants. */
typedef void channels_pass(const pool_element *e, int64_t c, int vectors, int64_t lanes, bool half);

/* Blocks, then single vectors, the last of which overlaps the one before it. */
static ALWAYS_INLINE void all_channels(channels_pass *pass, const pool_element *e, int64_t channels, const bool half) {
  int64_t c = 0;
  for (; channels - c >= BLOCK * LANES; c += BLOCK * LANES)
    pass(e, c, BLOCK, LANES, half);
  for (; channels - c >= 2 * LANES; c += 2 * LANES)
    pass(e, c, 2, LANES, half);
  if (channels < LANES)
    pass(e, 0, 1, channels, half);
  else
    for (; c < channels; c += LANES)
      pass(e, channels - c < LANES ? channels - LANES : c, 1, LANES, half);
}

/* Row r of all images' rows of the map that is written; rows and columns are the spans that its elements read. */
static ALWAYS_INLINE void whole_row(channels_pass *pass, pool_element e, int64_t r, const pool_span *rows,
                                    int64_t height, const pool_span *columns, int64_t width) {
  const bool half = e.plan->half;
  const int64_t channels = e.plan->channels;
  e.image = r / height;
  e.h = r % height;
  e.row = rows[e.h];
  for (e.w = 0; e.w < width; e.w++) {
    e.column = columns[e.w];
    e.to = (r * width + e.w) * channels;
    if (half)
      all_channels(pass, &e, channels, true);
    else
      all_channels(pass, &e, channels, false);
  }
}

static ALWAYS_INLINE void output_row(channels_pass *pass, const pool_element *e, int64_t r) {
  whole_row(pass, *e, r, e->plan->row, e->plan->rows, e->plan->column, e->plan->columns);
}

static ALWAYS_INLINE void input_row(channels_pass *pass, const pool_element *e, int64_t r) {
  whole_row(pass, *e, r, e->plan->over_row, e->plan->height, e->plan->over_column, e->plan->width);
}

/* Where channel 0 is of a position of the input, and of an output. */
static ALWAYS_INLINE int64_t input_at(const pool_element *e, int64_t h, int64_t w) {
  return ((e->image * e->plan->height + h) * e->plan->width + w) * e->plan->channels;
}

static ALWAYS_INLINE int64_t output_at(const pool_element *e, int64_t p, int64_t q) {
  return ((e->image * e->plan->rows + p) * e->plan->columns + q) * e->plan->channels;
}

static ALWAYS_INLINE int_lanes choose(int_lanes mask, int_lanes a, int_lanes b) {
  return (a & mask) | (b & ~mask);
}

static ALWAYS_INLINE int_lanes all_lanes(int64_t value) {
  return (int_lanes){0} + (int32_t)value;
}

/* ---- maximum ---- */

/* The prologue's terms for the channels of a pass. */
typedef struct {
  float_lanes scale[BLOCK], shift[BLOCK], least;
} prologue_lanes;

static ALWAYS_INLINE void load_prologue(prologue_lanes *p, const pool_element *e, int64_t c, const int vectors,
                                        const int64_t lanes) {
  p->least = (float_lanes){0} - (e->relu ? 0 : INFINITY);
  for (int v = 0; v < vectors; v++) {
    p->scale[v] = load_some_lanes(e->scale, c + v * LANES, lanes, false);
    p->shift[v] = load_some_lanes(e->shift, c + v * LANES, lanes, false);
  }
}

static ALWAYS_INLINE float_lanes after_prologue(const prologue_lanes *p, int v, float_lanes value, const bool half) {
  value = rounded_lanes(multiply_add_lanes(p->scale[v], value, p->shift[v]), half);
  return (float_lanes)choose(value < p->least, (int_lanes)p->least, (int_lanes)value);
}

static ALWAYS_INLINE void largest(const pool_element *e, int64_t c, const int vectors, const int64_t lanes,
                                  const bool half, const bool prologue) {
  const pool_span h = e->row, w = e->column;
  const int64_t width = e->plan->width;
  float_lanes best[BLOCK];
  int_lanes index[BLOCK];
  prologue_lanes before;
  if (prologue)
    load_prologue(&before, e, c, vectors, lanes);
  for (int v = 0; v < vectors; v++) {
    best[v] = (float_lanes){0} - INFINITY;
    index[v] = all_lanes(h.first < h.end && w.first < w.end ? h.first * width + w.first : -1);
  }
  for (int64_t i = h.first; i < h.end; i += h.step)
    for (int64_t j = w.first; j < w.end; j += w.step) {
      int64_t at = input_at(e, i, j) + c;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        float_lanes value = load_some_lanes(e->from, at + v * LANES, lanes, half);
        if (prologue)
          value = after_prologue(&before, v, value, half);
        int_lanes take = ~(value <= best[v]) & (best[v] == best[v]); /* larger, or the first NaN */
        best[v] = (float_lanes)choose(take, (int_lanes)value, (int_lanes)best[v]);
        index[v] = choose(take, all_lanes(i * width + j), index[v]);
      }
    }
  for (int v = 0; v < vectors; v++) {
    store_some_lanes(e->into, e->to + c + v * LANES, best[v], lanes, half);
    if (e->indices)
      memcpy(e->indices + e->to + c + v * LANES, &index[v], (size_t)lanes * sizeof(int32_t));
  }
}

static ALWAYS_INLINE void take_largest(const pool_element *e, int64_t c, const int vectors, const int64_t lanes,
                                       const bool half) {
  largest(e, c, vectors, lanes, half, false);
}

static ALWAYS_INLINE void take_largest_after(const pool_element *e, int64_t c, const int vectors, const int64_t lanes,
                                             const bool half) {
  largest(e, c, vectors, lanes, half, true);
}

/* The gradients of those windows over an element that took it. */
static ALWAYS_INLINE void add_if_taken(const pool_element *e, int64_t c, const int vectors, const int64_t lanes,
                                       const bool half) {
  const int_lanes position = all_lanes(e->h * e->plan->width + e->w);
  float_lanes sum[BLOCK];
  for (int v = 0; v < vectors; v++)
    sum[v] = (float_lanes){0};
  for (int64_t p = e->row.first; p < e->row.end; p++)
    for (int64_t q = e->column.first; q < e->column.end; q++) {
      int64_t at = output_at(e, p, q) + c;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        int_lanes index = {0};
        memcpy(&index, e->indices + at + v * LANES, (size_t)lanes * sizeof(int32_t));
        float_lanes value = load_some_lanes(e->from, at + v * LANES, lanes, half);
        sum[v] += (float_lanes)((int_lanes)value & (index == position));
      }
    }
  for (int v = 0; v < vectors; v++)
    store_some_lanes(e->into, e->to + c + v * LANES, sum[v], lanes, half);
}

static void max_forward_row(const pool_element *e, int64_t r) {
  output_row(take_largest, e, r);
}

static void max_forward_row_after(const pool_element *e, int64_t r) {
  output_row(take_largest_after, e, r);
}

static void max_backward_row(const pool_element *e, int64_t r) {
  input_row(add_if_taken, e, r);
}

/* ---- average ---- */

static ALWAYS_INLINE void take_average(const pool_element *e, int64_t c, const int vectors, const int64_t lanes,
                                       const bool half) {
  float_lanes sum[BLOCK], row_sum[BLOCK]; /* row by row: a large window's sum keeps its accuracy */
  for (int v = 0; v < vectors; v++)
    sum[v] = (float_lanes){0};
  for (int64_t i = e->row.first; i < e->row.end; i++) {
    for (int v = 0; v < vectors; v++)
      row_sum[v] = (float_lanes){0};
    for (int64_t j = e->column.first; j < e->column.end; j++) {
      int64_t at = input_at(e, i, j) + c;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++)
        row_sum[v] += load_some_lanes(e->from, at + v * LANES, lanes, half);
    }
    for (int v = 0; v < vectors; v++)
      sum[v] += row_sum[v];
  }
  int64_t divisor = e->row.divisor * e->column.divisor;
  for (int v = 0; v < vectors; v++)
    store_some_lanes(e->into, e->to + c + v * LANES, sum[v] / (float)(divisor > 0 ? divisor : 1), lanes, half);
}

/* An element's share in the gradient of each window over it. */
static ALWAYS_INLINE void add_shares(const pool_element *e, int64_t c, const int vectors, const int64_t lanes,
                                     const bool half) {
  float_lanes sum[BLOCK];
  for (int v = 0; v < vectors; v++)
    sum[v] = (float_lanes){0};
  for (int64_t p = e->row.first; p < e->row.end; p++)
    for (int64_t q = e->column.first; q < e->column.end; q++) {
      int64_t at = output_at(e, p, q) + c;
      float share = e->plan->row[p].share * e->plan->column[q].share;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++)
        sum[v] += share * load_some_lanes(e->from, at + v * LANES, lanes, half);
    }
  for (int v = 0; v < vectors; v++)
    store_some_lanes(e->into, e->to + c + v * LANES, sum[v], lanes, half);
}

static void average_forward_row(const pool_element *e, int64_t r) {
  output_row(take_average, e, r);
}

static void average_backward_row(const pool_element *e, int64_t r) {
  input_row(add_shares, e, r);
}

/* ---- the entries ---- */

static bool are_maps(const device_array *a, const device_array *b) {
  return a->dtype == b->dtype && (a->dtype == OREPA_FLOAT32 || a->dtype == OREPA_BFLOAT16);
}

/* Every row of the map that is written goes to one thread; x is the map, y has an element for each window. `e` has what
 * a pass reads and writes; scratch holds the plan. */
static device_status every_row(void (*row_pass)(const pool_element *, int64_t), pool_element e, void *scratch,
                               const device_windows *windows, const device_array *into, const device_array *y,
                               const device_array *x) {
  pool_plan plan = KERNEL(pool_plan_in)(scratch, windows, y, x);
  e.plan = &plan;
  int64_t rows = plan.channels ? into->shape[0] * into->shape[2] : 0; /* without channels there is no memory */
#pragma omp parallel for schedule(static) if (plan.images * plan.channels * plan.height * plan.width >= PARALLEL_FROM)
  for (int64_t r = 0; r < rows; r++)
    row_pass(&e, r);
  return DEVICE_DONE;
}

/* Room for the plan, and `more` bytes before it. */
static char *scratch_for(device_context *context, size_t more, const device_array *y, const device_array *x) {
  return context->workspace(context, more + KERNEL(pool_plan_bytes)(y, x) + 1); /* never none */
}

device_status KERNEL(max_pool_forward)(device_context *context, const device_windows *windows, const device_array *y,
                                       const device_array *indices, const device_array *x,
                                       const device_prologue *prologue) {
  if (!are_maps(y, x) || (indices && indices->dtype != OREPA_INT32))
    return DEVICE_UNSUPPORTED;
  if (prologue && (prologue->scale.dtype != OREPA_FLOAT32 || prologue->shift.dtype != OREPA_FLOAT32))
    return DEVICE_UNSUPPORTED;
  int64_t channels = prologue ? x->shape[1] : 0;
  size_t terms = (size_t)(2 * channels + channels % 2 * 2) * sizeof(float); /* the plan's numbers stay aligned */
  char *scratch = scratch_for(context, terms, y, x);
  if (!scratch)
    return DEVICE_FAILED;
  pool_element e = {.from = x->data, .into = y->data, .indices = indices ? indices->data : NULL};
  if (prologue) {
    e.scale = dense_channels(&prologue->scale, (float *)scratch);
    e.shift = dense_channels(&prologue->shift, (float *)scratch + channels);
    e.relu = prologue->relu;
  }
  return every_row(prologue ? max_forward_row_after : max_forward_row, e, scratch + terms, windows, y, y, x);
}

device_status KERNEL(max_pool_backward)(device_context *context, const device_windows *windows, const device_array *dx,
                                        const device_array *dy, const device_array *indices) {
  if (!are_maps(dx, dy) || indices->dtype != OREPA_INT32)
    return DEVICE_UNSUPPORTED;
  char *scratch = scratch_for(context, 0, dy, dx);
  if (!scratch)
    return DEVICE_FAILED;
  pool_element e = {.from = dy->data, .into = dx->data, .indices = indices->data};
  return every_row(max_backward_row, e, scratch, windows, dx, dy, dx);
}

void KERNEL(max_pool_gather)(const pool_plan *plan, const void *dy, const int32_t *indices, int64_t first,
                             int64_t count, void *into) {
  pool_element e = {.plan = plan, .from = dy, .into = into, .indices = (int32_t *)indices};
  int64_t line = first / plan->width;
  e.w = first % plan->width;
  e.image = line / plan->height;
  e.h = line % plan->height;
  for (int64_t k = 0; k < count; k++, e.to += plan->channels) {
    e.row = plan->over_row[e.h];
    e.column = plan->over_column[e.w];
    if (plan->half)
      all_channels(add_if_taken, &e, plan->channels, true);
    else
      all_channels(add_if_taken, &e, plan->channels, false);
    if (++e.w < plan->width)
      continue;
    e.w = 0;
    if (++e.h == plan->height) {
      e.h = 0;
      e.image++;
    }
  }
}

/* Averages are of neighbours: their windows have no dilation. */
static device_windows average_windows(const device_windows *windows) {
  device_windows dense = *windows;
  dense.pool.dilation[0] = dense.pool.dilation[1] = 1;
  return dense;
}

device_status KERNEL(avg_pool_forward)(device_context *context, const device_windows *windows, const device_array *y,
                                       const device_array *x) {
  device_windows dense = average_windows(windows);
  if (!are_maps(y, x))
    return DEVICE_UNSUPPORTED;
  char *scratch = scratch_for(context, 0, y, x);
  if (!scratch)
    return DEVICE_FAILED;
  return every_row(average_forward_row, (pool_element){.from = x->data, .into = y->data}, scratch, &dense, y, y, x);
}

device_status KERNEL(avg_pool_backward)(device_context *context, const device_windows *windows, const device_array *dx,
                                        const device_array *dy) {
  device_windows dense = average_windows(windows);
  if (!are_maps(dx, dy))
    return DEVICE_UNSUPPORTED;
  char *scratch = scratch_for(context, 0, dy, dx);
  if (!scratch)
    return DEVICE_FAILED;
  return every_row(average_backward_row, (pool_element){.from = dy->data, .into = dx->data}, scratch, &dense, dx, dy,
                   dx);
}
