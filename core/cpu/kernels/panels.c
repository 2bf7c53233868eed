/* panels.c: products with a kernel that lies in panels, as cpu/conv_panels.c makes convolutions of. */
#include "cpu/conv_panels.h"
#include "cpu/kernels/product.h"
#include "cpu/kernels/winograd.h"

/* Panel `panel` of w (out, depth): [step][column]. */
static void pack(const float *w, int64_t out, int64_t depth, int64_t panel, float *to) {
  const float *rows[PANEL];
  int64_t count = smaller(PANEL, out - panel * PANEL);
  for (int64_t k = 0; k < count; k++)
    rows[k] = w + (panel * PANEL + k) * depth;
  pack_panel(depth, PANEL, count, rows, to);
}

/* act(y + bias + residual) of one vector's columns. */
static ALWAYS_INLINE void follow(float *y, const float *bias, const float *residual, bool relu) {
  float_lanes value = load_lanes(y, 0, false);
  if (bias)
    value += load_lanes(bias, 0, false);
  if (residual)
    value += load_lanes(residual, 0, false);
  store_lanes(y, 0, relu ? relu_lanes(value) : value, false);
}

static void multiply(const panel_product *p, int64_t panel) {
  int64_t first = panel * PANEL, columns = smaller(PANEL, p->out - first);
  float *y = p->y + first;
  const float *bias = p->after.bias, *residual = p->after.residual;
  KERNEL(winograd_product)
  (false, (int)p->rows, p->depth, p->a, p->step, p->kernel + first * p->depth, columns, y, p->channels, false);
  if (!bias && !residual && !p->after.relu)
    return;
  for (int64_t r = 0; r < p->rows; r++)
    for (int64_t c = 0; c < columns; c += LANES) {
      int64_t at = r * p->channels + c;
      follow(y + at, bias ? bias + first + c : NULL, residual ? residual + first + at : NULL, p->after.relu);
    }
}

const panel_kernels KERNEL(panels) = {PANEL, LANES, pack, multiply};
