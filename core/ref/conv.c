/* conv.c: convolution in its three directions. Output (p, q) sees through tap (kh, kw) the input position
 *
 *   h = p * stride + kh * dilation - padding,   w likewise,
 *
 * and each direction adds up what its own elements meet. x (N, I, H, W), w (O, I/G, KH, KW), y (N, O, P, Q). */
#include "ref/ref.h"

static int64_t input_position(const orepa_conv *conv, int axis, int64_t output, int64_t tap) {
  return output * conv->stride[axis] + tap * conv->dilation[axis] - conv->padding[axis];
}

/* The output that sees an input position through a tap; -1: none. */
static int64_t output_position(const orepa_conv *conv, int axis, int64_t input, int64_t tap, int64_t outputs) {
  int64_t steps = input + conv->padding[axis] - tap * conv->dilation[axis];
  if (steps < 0 || steps % conv->stride[axis] || steps / conv->stride[axis] >= outputs)
    return -1;
  return steps / conv->stride[axis];
}

static bool inside(const device_array *x, int64_t h, int64_t w) {
  return h >= 0 && h < x->shape[2] && w >= 0 && w < x->shape[3];
}

/* An element of the input as the convolution sees it. */
static double input_value(const device_array *x, const device_prologue *prologue, int64_t n, int64_t c, int64_t h,
                          int64_t w) {
  return ref_after_prologue(x, ref_at4(x, n, c, h, w), c, prologue);
}

/* The first input channel of output channel o's group. */
static int64_t first_input(const orepa_conv *conv, const device_array *w, int64_t o) {
  return o / (w->shape[0] / conv->groups) * w->shape[1];
}

/* ---- forward ---- */

device_conv_fusion ref_conv_fusion(device_context *context, const orepa_conv *conv, const device_array *y,
                                   const device_array *x, const device_array *w) {
  (void)context, (void)conv, (void)y, (void)x, (void)w;
  return (device_conv_fusion){.prologue = true, .weight_prologue = true, .moments = true};
}

static double output_value(const orepa_conv *conv, const device_array *x, const device_array *w,
                           const device_prologue *prologue, int64_t n, int64_t o, int64_t p, int64_t q) {
  double sum = 0;
  int64_t first = first_input(conv, w, o);
  for (int64_t kh = 0; kh < w->shape[2]; kh++)
    for (int64_t kw = 0; kw < w->shape[3]; kw++) {
      int64_t h = input_position(conv, 0, p, kh), v = input_position(conv, 1, q, kw);
      for (int64_t i = 0; i < w->shape[1] && inside(x, h, v); i++)
        sum += ref_get(w, ref_at4(w, o, i, kh, kw)) * input_value(x, prologue, n, first + i, h, v);
    }
  return sum;
}

static double followed(const device_epilogue *e, double sum, int64_t n, int64_t o, int64_t p, int64_t q) {
  if (e && e->bias)
    sum += ref_get(e->bias, o * e->bias->strides[0]);
  if (e && e->residual)
    sum += ref_get(e->residual, ref_at4(e->residual, n, o, p, q));
  return ref_activated(sum, e && e->relu);
}

device_status ref_conv_forward(device_context *context, const orepa_conv *conv, const device_array *y,
                               const device_array *x, const device_array *w, const device_epilogue *epilogue,
                               const device_prologue *prologue, const device_array *moments,
                               const device_packed *packed) {
  REF_ENTRY;
  (void)context, (void)packed;
  if (!orepa_dtype_is_float(y->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t n = 0; n < y->shape[0]; n++)
    for (int64_t o = 0; o < y->shape[1]; o++)
      for (int64_t p = 0; p < y->shape[2]; p++)
        for (int64_t q = 0; q < y->shape[3]; q++) {
          double sum = output_value(conv, x, w, prologue, n, o, p, q);
          ref_set(y, ref_at4(y, n, o, p, q), followed(epilogue, sum, n, o, p, q));
        }
  if (moments)
    ref_moments_of(moments, y);
  return DEVICE_DONE;
}

/* ---- the input's gradient ---- */

static double input_gradient(const orepa_conv *conv, const device_array *dy, const device_array *w, int64_t n,
                             int64_t c, int64_t h, int64_t v) {
  double sum = 0;
  int64_t outputs = w->shape[0] / conv->groups, first = c / w->shape[1] * outputs;
  for (int64_t kh = 0; kh < w->shape[2]; kh++)
    for (int64_t kw = 0; kw < w->shape[3]; kw++) {
      int64_t p = output_position(conv, 0, h, kh, dy->shape[2]), q = output_position(conv, 1, v, kw, dy->shape[3]);
      for (int64_t o = first; o < first + outputs && p >= 0 && q >= 0; o++)
        sum += ref_get(w, ref_at4(w, o, c % w->shape[1], kh, kw)) * ref_get(dy, ref_at4(dy, n, o, p, q));
    }
  return sum;
}

device_status ref_conv_backward_data(device_context *context, const orepa_conv *conv, const device_array *dx,
                                     const device_array *dy, const device_array *w) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(dx->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t n = 0; n < dx->shape[0]; n++)
    for (int64_t c = 0; c < dx->shape[1]; c++)
      for (int64_t h = 0; h < dx->shape[2]; h++)
        for (int64_t v = 0; v < dx->shape[3]; v++)
          ref_set(dx, ref_at4(dx, n, c, h, v), input_gradient(conv, dy, w, n, c, h, v));
  return DEVICE_DONE;
}

/* ---- the kernel's and the bias's gradient ---- */

static double kernel_gradient(const orepa_conv *conv, const device_array *x, const device_array *dy,
                              const device_prologue *prologue, int64_t o, int64_t c, int64_t kh, int64_t kw) {
  double sum = 0;
  for (int64_t n = 0; n < dy->shape[0]; n++)
    for (int64_t p = 0; p < dy->shape[2]; p++)
      for (int64_t q = 0; q < dy->shape[3]; q++) {
        int64_t h = input_position(conv, 0, p, kh), v = input_position(conv, 1, q, kw);
        if (inside(x, h, v))
          sum += ref_get(dy, ref_at4(dy, n, o, p, q)) * input_value(x, prologue, n, c, h, v);
      }
  return sum;
}

static double bias_gradient(const device_array *dy, int64_t o) {
  double sum = 0;
  for (int64_t n = 0; n < dy->shape[0]; n++)
    for (int64_t p = 0; p < dy->shape[2]; p++)
      for (int64_t q = 0; q < dy->shape[3]; q++)
        sum += ref_get(dy, ref_at4(dy, n, o, p, q));
  return sum;
}

device_status ref_conv_backward_weight(device_context *context, const orepa_conv *conv, const device_array *dw,
                                       const device_array *dbias, const device_array *x, const device_array *dy,
                                       const device_prologue *prologue) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(dw->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t o = 0; o < dw->shape[0]; o++)
    for (int64_t i = 0; i < dw->shape[1]; i++)
      for (int64_t kh = 0; kh < dw->shape[2]; kh++)
        for (int64_t kw = 0; kw < dw->shape[3]; kw++)
          ref_set(dw, ref_at4(dw, o, i, kh, kw),
                  kernel_gradient(conv, x, dy, prologue, o, first_input(conv, dw, o) + i, kh, kw));
  for (int64_t o = 0; dbias && o < dw->shape[0]; o++)
    ref_set(dbias, o * dbias->strides[0], bias_gradient(dy, o));
  return DEVICE_DONE;
}
