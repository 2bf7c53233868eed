/* conv.c: convolution in its three directions: sizes taken from the arrays, the fastest way chosen for them, and around
 * it what a way leaves to do (an input normalised first, a residual and a ReLU afterwards, a dense bias, bfloat16 in
 * float32 where there is no other way, empty arrays). conv_ways.c has the ways. */
#include <string.h>

#include "cpu/conv_ways.h"
#include "cpu/onednn.h"
#include "cpu/scratch.h"
#include "elementwise.h"

#define DECLARE(entry) __typeof__(*((orepa_device *)0)->entry) cpu_##entry
DECLARE(bfloat16_pays);
DECLARE(conv_fusion);
DECLARE(conv_forward);
DECLARE(conv_packed);
DECLARE(conv_backward_data);
DECLARE(conv_backward_weight);
#undef DECLARE

/* ---- sizes ---- */

static conv_geometry geometry_of(const orepa_conv *conv, const device_array *x, const device_array *w,
                                 const device_array *y) {
  conv_geometry g = {.dtype = x->dtype, .kernel_dtype = w->dtype, .batch = x->shape[0], .groups = conv->groups};
  g.in = w->shape[1];
  g.out = w->shape[0] / conv->groups;
  for (int axis = 0; axis < 2; axis++) {
    g.size[axis] = x->shape[2 + axis];
    g.kernel[axis] = w->shape[2 + axis];
    g.result[axis] = y->shape[2 + axis];
    g.stride[axis] = conv->stride[axis];
    g.padding[axis] = conv->padding[axis];
    g.dilation[axis] = g.kernel[axis] == 1 ? 1 : conv->dilation[axis];
  }
  return g;
}

static int64_t count(const device_array *a) {
  int64_t elements = 1;
  for (int d = 0; d < a->rank; d++)
    elements *= a->shape[d];
  return elements;
}

static bool is_map(const device_array *a) {
  return a->dtype == OREPA_FLOAT32 || a->dtype == OREPA_BFLOAT16;
}

static bool supported(const device_array *x, const device_array *w, const device_array *y, const device_array *bias) {
  return is_map(x) && w->dtype == x->dtype && y->dtype == x->dtype && (!bias || bias->dtype == x->dtype);
}

static bool is_gradient_of(const device_array *d, const device_array *x) {
  return !d || d->dtype == x->dtype || d->dtype == OREPA_FLOAT32;
}

/* ---- one convolution ---- */

/* A convolution on its way: what is planned before scratch is taken, and the pointers. */
typedef struct {
  conv_direction direction;
  conv_wish wish;
  conv_geometry g;    /* as it is computed */
  conv_geometry seen; /* of the points that a strided 1x1 sees; g is then that of the points alone */
  bool takes_points;
  conv_choice choice;
  cpu_scratch scratch;
  size_t own, points, normal, lent, dense[3]; /* places */
  size_t lent_bytes;
  bool widens;          /* bfloat16 computed in float32: g is then that of float32 */
  int64_t kernel_dtype; /* as given */
  size_t wide_x, wide_w, wide_y, wide_bias;
  void *x, *w, *y;
  conv_epilogue after;
  const float *scale, *shift; /* of a prologue that is fused */
  bool relu;
  float *moments; /* that are fused */
  const device_packed *packed;
} conv_work;

static bool is_strided_point(const conv_geometry *g) {
  return conv_is_point(g) && !conv_is_matrix(g);
}

/* The same with the points as its map. */
static conv_geometry of_points(const conv_geometry *g) {
  conv_geometry points = *g;
  for (int axis = 0; axis < 2; axis++) {
    points.size[axis] = g->result[axis];
    points.stride[axis] = 1;
    points.padding[axis] = 0;
  }
  return points;
}

static int64_t count_x(const conv_geometry *g) {
  return g->batch * g->groups * g->in * pixels(g->size);
}
static int64_t count_w(const conv_geometry *g) {
  return g->groups * g->out * g->in * pixels(g->kernel);
}
static int64_t count_y(const conv_geometry *g) {
  return g->batch * g->groups * g->out * pixels(g->result);
}

static device_status plan_in_type(conv_work *c, int follows) {
  size_t size = orepa_dtype_size((orepa_dtype)c->g.dtype);
  c->takes_points = is_strided_point(&c->g) && conv_preferred(c->direction, &c->g, c->wish) != BY_POSITIONS;
  if (c->takes_points) {
    c->seen = c->g;
    c->g = of_points(&c->seen);
    c->points = scratch_place(&c->scratch, (size_t)count_x(&c->g) * size);
  }
  device_status status = conv_choose(c->direction, &c->g, follows, c->wish, &c->choice);
  c->own = scratch_place(&c->scratch, c->choice.bytes);
  return status;
}

/* Scratch for the entries that are called on the way: `count` numbers and some. */
static void plan_lent(conv_work *c, int64_t count) {
  c->lent_bytes = (size_t)(count + 1024) * sizeof(float);
  c->lent = scratch_place(&c->scratch, c->lent_bytes);
}

static device_status plan(conv_work *c, int follows) {
  conv_geometry given = c->g;
  c->kernel_dtype = given.kernel_dtype;
  device_status status = plan_in_type(c, follows);
  if (status != DEVICE_UNSUPPORTED || given.dtype != OREPA_BFLOAT16)
    return status;
  c->widens = true;
  c->g = given;
  c->g.dtype = c->g.kernel_dtype = OREPA_FLOAT32;
  c->scratch = (cpu_scratch){0};
  c->wide_x = scratch_place(&c->scratch, (size_t)count_x(&given) * sizeof(float));
  c->wide_w = scratch_place(&c->scratch, (size_t)count_w(&given) * sizeof(float));
  c->wide_y = scratch_place(&c->scratch, (size_t)count_y(&given) * sizeof(float));
  c->wide_bias = scratch_place(&c->scratch, (size_t)(given.groups * given.out) * sizeof(float));
  plan_lent(c, 0);
  status = plan_in_type(c, follows & FOLLOWED_BY_BIAS);
  c->choice.packed = 0;
  return status;
}

/* What is planned, with scratch taken and x, w, y and bias set. */
static device_status compute_in_type(conv_work *c) {
  void *x = c->x;
  size_t size = orepa_dtype_size((orepa_dtype)c->g.dtype);
  if (c->takes_points) {
    x = c->scratch.memory + c->points;
    if (c->direction != CONV_BACKWARD_DATA)
      conv_take_points(&c->seen, size, x, c->x);
  }
  device_status status =
      conv_run(&c->choice, &(conv_call){c->direction, &c->g, x, c->w, c->y, c->after, c->scale, c->shift, c->relu,
                                        c->moments, c->packed, c->scratch.memory + c->own});
  if (status == DEVICE_DONE && c->takes_points && c->direction == CONV_BACKWARD_DATA)
    conv_spread_points(&c->seen, size, c->x, x);
  return status;
}

/* `count` numbers without gaps from one type to another. */
static device_status convert(device_context *context, int64_t count, orepa_dtype to_type, void *to,
                             orepa_dtype from_type, const void *from) {
  device_array target = {.data = to, .dtype = to_type, .rank = 1, .shape = {count}, .strides = {1}};
  device_array source = {.data = (void *)from, .dtype = from_type, .rank = 1, .shape = {count}, .strides = {1}};
  return context->device->copy(context, &target, &source);
}

static device_status compute(device_context *context, conv_work *c) {
  if (!c->widens)
    return compute_in_type(c);
  const conv_geometry *g = c->takes_points ? &c->seen : &c->g;
  char *memory = c->scratch.memory;
  device_context lent = scratch_lend(context, memory + c->lent, c->lent_bytes);
  bool wide_kernel = c->kernel_dtype == OREPA_FLOAT32; /* a gradient that is float32 already */
  struct {
    bool result;
    int64_t count;
    void **place, *given, *wide;
  } all[] = {{c->direction == CONV_BACKWARD_DATA, count_x(g), &c->x, c->x, memory + c->wide_x},
             {c->direction == CONV_BACKWARD_WEIGHT, count_w(g), &c->w, c->w, wide_kernel ? c->w : memory + c->wide_w},
             {c->direction == CONV_FORWARD, count_y(g), &c->y, c->y, memory + c->wide_y}};
  device_status status = DEVICE_DONE;
  for (int k = 0; k < 3 && status == DEVICE_DONE; k++) {
    *all[k].place = all[k].wide;
    if (!all[k].result)
      status = convert(&lent, all[k].count, OREPA_FLOAT32, all[k].wide, OREPA_BFLOAT16, all[k].given);
  }
  if (c->after.bias && status == DEVICE_DONE) {
    status = convert(&lent, g->groups * g->out, OREPA_FLOAT32, memory + c->wide_bias, OREPA_BFLOAT16, c->after.bias);
    c->after.bias = memory + c->wide_bias;
  }
  if (status == DEVICE_DONE)
    status = compute_in_type(c);
  for (int k = 0; k < 3 && status == DEVICE_DONE; k++)
    if (all[k].result && all[k].wide != all[k].given)
      status = convert(&lent, all[k].count, OREPA_BFLOAT16, all[k].given, OREPA_FLOAT32, all[k].wide);
  return status;
}

/* ---- what goes with a convolution: numbers of the channels, an input to be normalised ---- */

static int follows_of(const device_epilogue *e) {
  return e ? conv_follows(&(conv_epilogue){e->bias, e->residual, e->relu}) : 0;
}

/* Room for the numbers of `a`, if they have to be moved side by side. */
static size_t place_dense(conv_work *c, const device_array *a) {
  return scratch_place(&c->scratch, a ? (size_t)a->shape[0] * orepa_dtype_size(a->dtype) : 0);
}

static const void *dense(const conv_work *c, const device_array *a, size_t place) {
  size_t size = orepa_dtype_size(a->dtype);
  char *copy = c->scratch.memory + place;
  if (a->strides[0] == 1)
    return a->data;
  for (int64_t o = 0; o < a->shape[0]; o++)
    memcpy(copy + (size_t)o * size, (const char *)a->data + o * a->strides[0] * (int64_t)size, size);
  return copy;
}

static bool fuses_prologue(const conv_work *c) {
  return !c->widens && conv_way_fuses(c->choice.way).prologue;
}

static void plan_prologue(conv_work *c, const device_array *x, const device_prologue *prologue) {
  if (!prologue)
    return;
  if (fuses_prologue(c)) {
    c->dense[0] = place_dense(c, &prologue->scale);
    c->dense[1] = place_dense(c, &prologue->shift);
  } else {
    c->normal = scratch_place(&c->scratch, (size_t)count(x) * orepa_dtype_size(x->dtype));
    plan_lent(c, 16 * x->shape[1]);
  }
}

static device_status run_prologue(device_context *context, conv_work *c, const device_array *x,
                                  const device_prologue *prologue) {
  if (!prologue)
    return DEVICE_DONE;
  if (fuses_prologue(c)) {
    c->scale = dense(c, &prologue->scale, c->dense[0]);
    c->shift = dense(c, &prologue->shift, c->dense[1]);
    c->relu = prologue->relu;
    return DEVICE_DONE;
  }
  device_context lent = scratch_lend(context, c->scratch.memory + c->lent, c->lent_bytes);
  device_array normal = *x;
  normal.data = c->x = c->scratch.memory + c->normal;
  return context->device->norm_apply(&lent, &normal, x, &prologue->scale, &prologue->shift, NULL, NULL, NULL,
                                     prologue->relu);
}

/* ---- entries ---- */

bool cpu_bfloat16_pays(device_context *context) {
  (void)context;
  return onednn_has_tiles();
}

device_conv_fusion cpu_conv_fusion(device_context *context, const orepa_conv *conv, const device_array *y,
                                   const device_array *x, const device_array *w) {
  bool empty = count(y) == 0 || count(x) == 0 || count(w) == 0;
  if (empty || !supported(x, w, y, NULL))
    return (device_conv_fusion){false, false, false};
  conv_geometry g = geometry_of(conv, x, w, y);
  const conv_wish wish = {.accurate = context->accurate};
  device_conv_fusion fusion = conv_way_fuses(conv_preferred(CONV_FORWARD, &g, wish));
  fusion.weight_prologue = conv_way_fuses(conv_preferred(CONV_BACKWARD_WEIGHT, &g, wish)).weight_prologue;
  return fusion;
}

size_t cpu_conv_packed(device_context *context, const orepa_conv *conv, const device_array *y, const device_array *x,
                       const device_array *w, const device_epilogue *epilogue, int64_t *mark) {
  conv_work c = {.direction = CONV_FORWARD, .wish = {context->accurate, true}, .g = geometry_of(conv, x, w, y)};
  bool empty = count(y) == 0 || count(x) == 0 || count(w) == 0;
  if (empty || !supported(x, w, y, NULL) || plan(&c, follows_of(epilogue)) != DEVICE_DONE)
    return 0;
  *mark = c.choice.mark;
  return c.choice.packed;
}

/* y = bias, or zeros: what is left where the kernel or the map is empty. */
static device_status fill_result(device_context *context, const device_array *y, const device_array *bias) {
  device_array spread = *y;
  if (!bias)
    return context->device->fill(context, y, (device_number){0});
  spread.data = bias->data;
  memset(spread.strides, 0, sizeof spread.strides);
  spread.strides[1] = bias->strides[0];
  return context->device->copy(context, y, &spread);
}

/* What no way did of the epilogue: y + residual, then the ReLU. */
static device_status finish(device_context *context, const conv_work *c, int wanted, int done, const device_array *y,
                            const device_array *residual) {
  device_context lent = scratch_lend(context, c->scratch.memory + c->lent, c->lent_bytes);
  device_status status = DEVICE_DONE;
  if (wanted & ~done & FOLLOWED_BY_RESIDUAL)
    status = context->device->elementwise(&lent, FUNCTION_add, 0, y, (device_array[]){*y, *residual}, NULL);
  if (status == DEVICE_DONE && wanted & ~done & FOLLOWED_BY_RELU)
    status = context->device->elementwise(&lent, FUNCTION_relu, 0, y, y, NULL);
  return status;
}

static device_status forward(device_context *context, conv_work *c, const device_array *y, const device_array *x,
                             const device_epilogue *epilogue, const device_prologue *prologue,
                             const device_array *moments) {
  const device_array *bias = epilogue ? epilogue->bias : NULL, *residual = epilogue ? epilogue->residual : NULL;
  const int follows = follows_of(epilogue);
  device_status status = plan(c, follows);
  if (status != DEVICE_DONE)
    return status;
  const int done = c->choice.follows;
  plan_prologue(c, x, prologue);
  if (!c->lent_bytes)
    plan_lent(c, 0);
  c->dense[2] = place_dense(c, bias);
  if (!scratch_take(&c->scratch, context))
    return DEVICE_FAILED;
  c->after = (conv_epilogue){bias ? dense(c, bias, c->dense[2]) : NULL, residual ? residual->data : NULL,
                             epilogue && epilogue->relu};
  bool measures = done == follows && !c->widens && conv_way_fuses(c->choice.way).moments;
  c->moments = moments && measures ? moments->data : NULL;
  status = run_prologue(context, c, x, prologue);
  if (status == DEVICE_DONE)
    status = compute(context, c);
  if (status == DEVICE_DONE && follows != done)
    status = finish(context, c, follows, done, y, residual);
  return status == DEVICE_DONE && moments && !c->moments ? context->device->norm_moments(context, moments, y) : status;
}

/* act(bias + residual) of nothing: what is left where the kernel or the map is empty. */
static device_status forward_of_nothing(device_context *context, const device_array *y,
                                        const device_epilogue *epilogue) {
  conv_work c = {0};
  device_status status = fill_result(context, y, epilogue ? epilogue->bias : NULL);
  plan_lent(&c, 0);
  if (status == DEVICE_DONE && !scratch_take(&c.scratch, context))
    status = DEVICE_FAILED;
  return status == DEVICE_DONE && epilogue
             ? finish(context, &c, follows_of(epilogue), FOLLOWED_BY_BIAS, y, epilogue->residual)
             : status;
}

device_status cpu_conv_forward(device_context *context, const orepa_conv *conv, const device_array *y,
                               const device_array *x, const device_array *w, const device_epilogue *epilogue,
                               const device_prologue *prologue, const device_array *moments,
                               const device_packed *packed) {
  conv_work c = {.direction = CONV_FORWARD,
                 .wish = {context->accurate, packed},
                 .g = geometry_of(conv, x, w, y),
                 .x = x->data,
                 .w = w->data,
                 .y = y->data,
                 .packed = packed && packed->memory ? packed : NULL};
  if (!supported(x, w, y, epilogue ? epilogue->bias : NULL))
    return DEVICE_UNSUPPORTED;
  if (count(y) && count(x) && count(w))
    return forward(context, &c, y, x, epilogue, prologue, moments);
  device_status status = count(y) ? forward_of_nothing(context, y, epilogue) : DEVICE_DONE;
  return status == DEVICE_DONE && moments ? context->device->norm_moments(context, moments, y) : status;
}

device_status cpu_conv_backward_data(device_context *context, const orepa_conv *conv, const device_array *dx,
                                     const device_array *dy, const device_array *w) {
  conv_work c = {
      .direction = CONV_BACKWARD_DATA, .wish.accurate = context->accurate, .g = geometry_of(conv, dx, w, dy)};
  if (!supported(dx, w, dy, NULL))
    return DEVICE_UNSUPPORTED;
  if (count(dx) == 0 || count(dy) == 0 || count(w) == 0)
    return context->device->fill(context, dx, (device_number){0});
  device_status status = plan(&c, 0);
  if (status != DEVICE_DONE)
    return status;
  if (!scratch_take(&c.scratch, context))
    return DEVICE_FAILED;
  c.x = dx->data;
  c.w = w->data;
  c.y = dy->data;
  return compute(context, &c);
}

static device_status backward_weight(device_context *context, conv_work *c, const device_array *x,
                                     const device_prologue *prologue) {
  device_status status = plan(c, 0);
  if (status != DEVICE_DONE)
    return status;
  plan_prologue(c, x, prologue);
  if (!scratch_take(&c->scratch, context))
    return DEVICE_FAILED;
  status = run_prologue(context, c, x, prologue);
  return status == DEVICE_DONE ? compute(context, c) : status;
}

device_status cpu_conv_backward_weight(device_context *context, const orepa_conv *conv, const device_array *dw,
                                       const device_array *dbias, const device_array *x, const device_array *dy,
                                       const device_prologue *prologue) {
  conv_work c = {
      .direction = CONV_BACKWARD_WEIGHT, .wish.accurate = context->accurate, .g = geometry_of(conv, x, dw, dy)};
  if (!supported(x, x, dy, NULL) || !is_gradient_of(dw, x) || !is_gradient_of(dbias, x))
    return DEVICE_UNSUPPORTED;
  c.x = x->data;
  c.w = dw->data;
  c.y = dy->data;
  bool empty = count(x) == 0 || count(dy) == 0 || count(dw) == 0;
  device_status status =
      empty ? context->device->fill(context, dw, (device_number){0}) : backward_weight(context, &c, x, prologue);
  if (status != DEVICE_DONE || !dbias)
    return status;
  device_array sum = *dbias; /* (1, O, 1, 1) */
  sum.rank = 4;
  sum.shape[0] = sum.shape[2] = sum.shape[3] = 1;
  sum.shape[1] = dbias->shape[0];
  sum.strides[0] = sum.strides[2] = sum.strides[3] = 0;
  sum.strides[1] = dbias->strides[0];
  return context->device->reduce(context, OREPA_SUM, &sum, dy);
}
