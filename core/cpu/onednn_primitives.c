/* onednn_primitives.c: primitives made ready and run.
 *
 * Maps are pinned to channels-last; kernels are given in the layout that an implementation wants and packed from or
 * unpacked to ours beside each call (pinned to O,H,W,I the library would run its reference code). Scratchpads are the
 * caller's. */
#include "cpu/onednn_primitives.h"

#include <string.h>

/* ---- any primitive ---- */

/* A memory without data for argument `place`; none for an empty scratchpad. */
static dnnl_status_t add_argument(onednn_primitive *p, const onednn_library *library, int place, int argument,
                                  onednn_layout layout) {
  p->arguments[place].arg = argument;
  if (dnnl_memory_desc_get_size(layout) == 0)
    return dnnl_success;
  return dnnl_memory_create(&p->arguments[place].memory, layout, library->engine, DNNL_MEMORY_NONE);
}

/* The primitive of a descriptor and its scratchpad, unless the implementation is one that is refused. */
static dnnl_status_t make_primitive(onednn_primitive *p, const onednn_library *library, bool refuse_gemm) {
  ONEDNN_TRY(dnnl_primitive_desc_query(p->desc, dnnl_query_impl_info_str, 0, &p->implementation));
  const char *name = p->implementation;
  if (strstr(name, "ref") || (refuse_gemm && (strstr(name, ":gemm") || !strncmp(name, "gemm", 4))))
    return dnnl_unimplemented;
  onednn_layout scratchpad = dnnl_primitive_desc_query_md(p->desc, dnnl_query_scratchpad_md, 0);
  p->scratchpad_bytes = dnnl_memory_desc_get_size(scratchpad);
  ONEDNN_TRY(dnnl_primitive_create(&p->primitive, p->desc));
  return add_argument(p, library, ARGUMENT_SCRATCHPAD, DNNL_ARG_SCRATCHPAD, scratchpad);
}

void onednn_primitive_free(onednn_primitive *p) {
  dnnl_primitive_destroy(p->primitive);
  dnnl_primitive_destroy(p->packing);
  for (int k = 0; k < ARGUMENTS; k++)
    dnnl_memory_destroy(p->arguments[k].memory);
  dnnl_memory_destroy(p->kernel);
  dnnl_memory_destroy(p->packing_scratchpad);
  dnnl_primitive_desc_destroy(p->desc);
  dnnl_primitive_desc_destroy(p->hint);
  dnnl_primitive_desc_destroy(p->packing_desc);
  *p = (onednn_primitive){0};
}

/* ---- convolutions ---- */

/* The kernel may be cropped to the taps that meet the map for some output. */
typedef struct {
  onednn_conv_layouts layouts;
  onednn_layout kernel; /* ours */
  dnnl_primitive_attr_t attributes;
  int64_t first[2], taps[2];
} conv_description;

/* On an axis without dilation, taps that meet nothing but padding are left out: 3x3 on a map of 1x1 is one tap. Besides
 * the time, 2.6.3's AMX kernels never write such taps' gradients. A single result that ends with the map is reached
 * without a step, and so a strided 3x3 on a map of 1x1 is no strided 1x1. */
static void crop_axis(const conv_geometry *g, int axis, conv_description *d) {
  int64_t first = conv_window_at(g, axis, g->result[axis] - 1).first, last = conv_window_at(g, axis, 0).last;
  bool crops = g->dilation[axis] == 1 && first < g->kernel[axis];
  onednn_conv_layouts *l = &d->layouts;
  d->first[axis] = crops ? first : 0;
  d->taps[axis] = (crops ? last : g->kernel[axis]) - d->first[axis];
  l->before[axis] = g->padding[axis] - d->first[axis];
  int64_t span = (d->taps[axis] - 1) * g->dilation[axis] + 1;
  int64_t after = (g->result[axis] - 1) * g->stride[axis] + span - g->size[axis] - l->before[axis];
  l->after[axis] = after > 0 ? after : 0;
  l->stride[axis] = g->result[axis] == 1 && after >= 0 ? 1 : g->stride[axis];
  l->dilation[axis] = g->dilation[axis] - 1;
}

static dnnl_status_t new_map(onednn_layout *layout, int64_t dtype, int64_t batch, int64_t channels,
                             const int64_t size[2]) {
  int64_t line = size[1] * channels, shape[] = {batch, channels, size[0], size[1]};
  return onednn_layout_new(layout, dtype, 4, shape, (int64_t[]){size[0] * line, 1, line, channels});
}

static dnnl_status_t describe(const conv_geometry *g, int follows, conv_description *d) {
  onednn_conv_layouts *l = &d->layouts;
  crop_axis(g, 0, d);
  crop_axis(g, 1, d);
  if (d->taps[0] * d->taps[1] == 1 && (l->stride[0] > 1 || l->stride[1] > 1))
    return dnnl_unimplemented; /* onednn.h says why */
  int64_t out = g->groups * g->out;
  ONEDNN_TRY(new_map(&l->x, g->dtype, g->batch, g->groups * g->in, g->size));
  ONEDNN_TRY(new_map(&l->y, g->dtype, g->batch, out, g->result));
  if (follows & FOLLOWED_BY_BIAS)
    ONEDNN_TRY(onednn_layout_new(&l->bias, g->dtype, 1, &out, (int64_t[]){1}));
  ONEDNN_TRY(
      onednn_attributes_new(&d->attributes, follows & FOLLOWED_BY_RESIDUAL ? l->y : NULL, follows & FOLLOWED_BY_RELU));
  int64_t line = g->kernel[1] * g->in, all = g->kernel[0] * line;
  int64_t shape[] = {g->groups, g->out, g->in, d->taps[0], d->taps[1]}, strides[] = {g->out * all, all, 1, line, g->in};
  int grouped = g->groups > 1;
  ONEDNN_TRY(onednn_layout_new(&l->w, g->dtype, 4 + grouped, shape + !grouped, NULL));
  ONEDNN_TRY(onednn_layout_new(&l->dw, g->kernel_dtype, 4 + grouped, shape + !grouped, NULL));
  return onednn_layout_new(&d->kernel, g->kernel_dtype, 4 + grouped, shape + !grouped, strides + !grouped);
}

static void free_description(conv_description *d) {
  onednn_layout_free(d->layouts.x);
  onednn_layout_free(d->layouts.w);
  onednn_layout_free(d->layouts.dw);
  onednn_layout_free(d->layouts.y);
  onednn_layout_free(d->layouts.bias);
  onednn_layout_free(d->kernel);
  dnnl_primitive_attr_destroy(d->attributes);
}

/* Both gradients take the forward pass's descriptor as a hint. */
static dnnl_status_t describe_primitive(onednn_primitive *p, const onednn_library *library, conv_direction direction,
                                        const conv_description *d) {
  if (direction != CONV_FORWARD)
    ONEDNN_TRY(onednn_describe_conv(library, CONV_FORWARD, &d->layouts, d->attributes, NULL, &p->hint));
  return onednn_describe_conv(library, direction, &d->layouts, d->attributes, p->hint, &p->desc);
}

/* The copy between our kernel and the primitive's, if they differ. */
static dnnl_status_t make_packing(onednn_primitive *p, const onednn_library *library, onednn_layout ours,
                                  onednn_layout wanted) {
  if (dnnl_memory_desc_equal(ours, wanted))
    return dnnl_success;
  ONEDNN_TRY(onednn_describe_copy(library, p->unpacks ? wanted : ours, p->unpacks ? ours : wanted, &p->packing_desc));
  onednn_layout scratchpad = dnnl_primitive_desc_query_md(p->packing_desc, dnnl_query_scratchpad_md, 0);
  p->packed_bytes = dnnl_memory_desc_get_size(wanted);
  p->packing_bytes = dnnl_memory_desc_get_size(scratchpad);
  ONEDNN_TRY(dnnl_primitive_create(&p->packing, p->packing_desc));
  ONEDNN_TRY(dnnl_memory_create(&p->kernel, ours, library->engine, DNNL_MEMORY_NONE));
  if (!p->packing_bytes)
    return dnnl_success;
  return dnnl_memory_create(&p->packing_scratchpad, scratchpad, library->engine, DNNL_MEMORY_NONE);
}

static dnnl_status_t make_described(onednn_primitive *p, const onednn_library *library, conv_direction direction,
                                    const conv_geometry *g, int follows, const conv_description *d) {
  static const int x_argument[] = {DNNL_ARG_SRC, DNNL_ARG_DIFF_SRC, DNNL_ARG_SRC};
  static const int w_argument[] = {DNNL_ARG_WEIGHTS, DNNL_ARG_WEIGHTS, DNNL_ARG_DIFF_WEIGHTS};
  static const int y_argument[] = {DNNL_ARG_DST, DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_DST};
  const onednn_conv_layouts *l = &d->layouts;
  ONEDNN_TRY(describe_primitive(p, library, direction, d));
  ONEDNN_TRY(make_primitive(p, library, g->dtype == OREPA_FLOAT32));
  if (onednn_conv_is_wrong(direction, l, p->implementation))
    return dnnl_unimplemented;
  p->unpacks = direction == CONV_BACKWARD_WEIGHT;
  onednn_layout wanted =
      dnnl_primitive_desc_query_md(p->desc, p->unpacks ? dnnl_query_diff_weights_md : dnnl_query_weights_md, 0);
  ONEDNN_TRY(make_packing(p, library, d->kernel, wanted));
  ONEDNN_TRY(add_argument(p, library, ARGUMENT_X, x_argument[direction], l->x));
  ONEDNN_TRY(add_argument(p, library, ARGUMENT_W, w_argument[direction], wanted));
  ONEDNN_TRY(add_argument(p, library, ARGUMENT_Y, y_argument[direction], l->y));
  if (l->bias)
    ONEDNN_TRY(add_argument(p, library, ARGUMENT_BIAS, DNNL_ARG_BIAS, l->bias));
  if (follows & FOLLOWED_BY_RESIDUAL)
    ONEDNN_TRY(add_argument(p, library, ARGUMENT_RESIDUAL, DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1, l->y));
  size_t size = orepa_dtype_size((orepa_dtype)g->kernel_dtype);
  p->kernel_offset = (size_t)((d->first[0] * g->kernel[1] + d->first[1]) * g->in) * size;
  if (p->unpacks && d->taps[0] * d->taps[1] < g->kernel[0] * g->kernel[1])
    p->kernel_cleared = (size_t)(g->groups * g->out * g->in * g->kernel[0] * g->kernel[1]) * size;
  return dnnl_success;
}

dnnl_status_t onednn_make_conv(onednn_primitive *p, const onednn_library *library, conv_direction direction,
                               const conv_geometry *g, int follows) {
  conv_description d = {0};
  dnnl_status_t status = describe(g, follows, &d);
  if (status == dnnl_success)
    status = make_described(p, library, direction, g, follows, &d);
  free_description(&d);
  return status;
}

bool onednn_same_packing(const onednn_primitive *p, const onednn_primitive *q) {
  if (!p->packing || !q->packing || p->unpacks || q->unpacks || p->kernel_offset != q->kernel_offset)
    return false;
  for (int side = 0; side < 2; side++) {
    dnnl_query_t what = side ? dnnl_query_dst_md : dnnl_query_src_md;
    if (!dnnl_memory_desc_equal(dnnl_primitive_desc_query_md(p->packing_desc, what, 0),
                                dnnl_primitive_desc_query_md(q->packing_desc, what, 0)))
      return false;
  }
  return true;
}

/* ---- matrix products ---- */

typedef struct {
  onednn_layout a, b, c, bias;
} product_description;

static dnnl_status_t describe_operands(const onednn_matmul_shape *s, bool has_bias, product_description *d) {
  int64_t a_shape[] = {s->a_strides[0] ? s->batch : 1, s->m, s->k};
  int64_t b_shape[] = {s->b_strides[0] ? s->batch : 1, s->k, s->n};
  int64_t a_strides[] = {s->a_strides[0] ? s->a_strides[0] : s->m * s->k, s->a_strides[1], s->a_strides[2]};
  int64_t b_strides[] = {s->b_strides[0] ? s->b_strides[0] : s->k * s->n, s->b_strides[1], s->b_strides[2]};
  if (s->batch > a_shape[0] && s->batch > b_shape[0])
    return dnnl_unimplemented; /* the library repeats one side only */
  if (s->m == 1 && s->k > 1 && s->a_strides[2] > 1)
    return dnnl_unimplemented; /* version 3.7 reads a row with gaps as if it had none */
  ONEDNN_TRY(onednn_layout_new(&d->a, s->dtype, 3, a_shape, a_strides));
  ONEDNN_TRY(onednn_layout_new(&d->b, s->dtype, 3, b_shape, b_strides));
  ONEDNN_TRY(
      onednn_layout_new(&d->c, s->result, 3, (int64_t[]){s->batch, s->m, s->n}, (int64_t[]){s->m * s->n, s->n, 1}));
  if (!has_bias)
    return dnnl_success;
  return onednn_layout_new(&d->bias, s->dtype, 3, (int64_t[]){1, 1, s->n}, (int64_t[]){s->n, s->n, 1});
}

static dnnl_status_t make_described_product(onednn_primitive *p, const onednn_library *library,
                                            const product_description *d) {
  ONEDNN_TRY(onednn_describe_product(library, d->a, d->b, d->bias, d->c, &p->desc));
  ONEDNN_TRY(make_primitive(p, library, false));
  ONEDNN_TRY(add_argument(p, library, ARGUMENT_X, DNNL_ARG_SRC, d->a));
  ONEDNN_TRY(add_argument(p, library, ARGUMENT_W, DNNL_ARG_WEIGHTS, d->b));
  ONEDNN_TRY(add_argument(p, library, ARGUMENT_Y, DNNL_ARG_DST, d->c));
  return d->bias ? add_argument(p, library, ARGUMENT_BIAS, DNNL_ARG_BIAS, d->bias) : dnnl_success;
}

dnnl_status_t onednn_make_product(onednn_primitive *p, const onednn_library *library, const onednn_matmul_shape *s,
                                  bool has_bias) {
  product_description d = {0};
  dnnl_status_t status = describe_operands(s, has_bias, &d);
  if (status == dnnl_success)
    status = make_described_product(p, library, &d);
  onednn_layout_free(d.a);
  onednn_layout_free(d.b);
  onednn_layout_free(d.c);
  onednn_layout_free(d.bias);
  return status;
}

/* ---- running ---- */

static size_t rounded(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

size_t onednn_primitive_scratch(const onednn_primitive *p) {
  return rounded(p->packed_bytes) + rounded(p->packing_bytes) + p->scratchpad_bytes;
}

static dnnl_status_t pack(onednn_primitive *p, const onednn_library *library, void *scratchpad) {
  dnnl_memory_t ours = p->kernel, wanted = p->arguments[ARGUMENT_W].memory;
  dnnl_exec_arg_t arguments[] = {{DNNL_ARG_FROM, p->unpacks ? wanted : ours},
                                 {DNNL_ARG_TO, p->unpacks ? ours : wanted},
                                 {DNNL_ARG_SCRATCHPAD, p->packing_scratchpad}};
  if (p->packing_scratchpad)
    ONEDNN_TRY(dnnl_memory_set_data_handle(p->packing_scratchpad, scratchpad));
  return dnnl_primitive_execute(p->packing, library->stream, p->packing_scratchpad ? 3 : 2, arguments);
}

dnnl_status_t onednn_primitive_run(onednn_primitive *p, const onednn_library *library, void *const given[ARGUMENTS],
                                   const device_packed *packed, char *scratch) {
  void *pointers[ARGUMENTS];
  dnnl_exec_arg_t arguments[ARGUMENTS];
  int count = 0;
  char *kernel = (char *)given[ARGUMENT_W] + p->kernel_offset;
  char *packing_scratchpad = scratch + rounded(p->packed_bytes);
  memcpy(pointers, given, sizeof pointers);
  pointers[ARGUMENT_W] = !p->packing ? kernel : packed ? packed->memory : scratch;
  pointers[ARGUMENT_SCRATCHPAD] = packing_scratchpad + rounded(p->packing_bytes);
  for (int k = 0; k < ARGUMENTS; k++)
    if (p->arguments[k].memory) {
      ONEDNN_TRY(dnnl_memory_set_data_handle(p->arguments[k].memory, pointers[k]));
      arguments[count++] = p->arguments[k];
    }
  if (p->packing)
    ONEDNN_TRY(dnnl_memory_set_data_handle(p->kernel, kernel));
  if (p->packing && !p->unpacks && !(packed && packed->ready))
    ONEDNN_TRY(pack(p, library, packing_scratchpad));
  if (p->kernel_cleared)
    memset(given[ARGUMENT_W], 0, p->kernel_cleared);
  ONEDNN_TRY(dnnl_primitive_execute(p->primitive, library->stream, count, arguments));
  if (p->packing && p->unpacks)
    ONEDNN_TRY(pack(p, library, packing_scratchpad));
  return dnnl_stream_wait(library->stream);
}
