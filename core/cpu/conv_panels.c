/* conv_panels.c: patches gathered, a product for each panel of the kernel. */
#include "cpu/conv_panels.h"

#include <omp.h>

#include "cpu/features.h"

enum {
  MOST_ROWS = 112,  /* output pixels: with more, oneDNN's kernels are as fast, without patches */
  WIDE = 16,        /* lanes: of narrower vectors the same holds for any stride of 1 */
  LEAST_DEPTH = 64, /* numbers in a patch */
  BLOCK = 112,      /* rows that are multiplied at a time: they stay in the second cache */
  GAP = 16,         /* between rows: cache sets */
};

static const panel_kernels *kernels(void) {
  static const panel_kernels *const all[CPU_ISAS] = CPU_EACH_ISA(&, panels);
  return all[cpu_isa_used()];
}

static int64_t step_of(const conv_geometry *g) {
  return conv_is_matrix(g) ? g->in : conv_depth(g) + GAP;
}

bool conv_panels_suit(conv_direction direction, const conv_geometry *g, bool kept) {
  bool strided = g->stride[0] > 1 || g->stride[1] > 1;
  return kept && direction == CONV_FORWARD && g->dtype == OREPA_FLOAT32 && g->groups == 1 &&
         g->out % kernels()->lanes == 0 && conv_rows(g) <= MOST_ROWS && conv_depth(g) >= LEAST_DEPTH &&
         (strided || kernels()->lanes >= WIDE);
}

size_t conv_panels_packed(const conv_geometry *g) {
  int64_t width = kernels()->width;
  return (size_t)((g->out + width - 1) / width * width * conv_depth(g)) * sizeof(float);
}

size_t conv_panels_scratch(const conv_geometry *g) {
  size_t patches = conv_is_matrix(g) ? 0 : (size_t)(conv_rows(g) * step_of(g)) * sizeof(float);
  return (patches + 63) / 64 * 64 + conv_panels_packed(g);
}

void conv_panels(const conv_geometry *g, const float *x, const float *w, float *y, const conv_epilogue *after,
                 const device_packed *packed, void *scratch) {
  const panel_kernels *k = kernels();
  int64_t rows = conv_rows(g), depth = conv_depth(g), step = step_of(g), panels = (g->out + k->width - 1) / k->width;
  float *kernel = packed ? packed->memory : scratch;
  float *patches = (float *)((char *)scratch + conv_panels_packed(g));
  if (!(packed && packed->ready)) {
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
      k->pack(w, g->out, depth, panel, kernel + panel * k->width * depth);
  }
  if (!conv_is_matrix(g))
    conv_gather(g, sizeof(float), x, 0, g->batch * g->result[0], step, patches);
  int64_t blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t block = 0; block < blocks; block++) {
      int64_t first = rows * block / blocks, last = rows * (block + 1) / blocks;
      panel_product p = {.rows = last - first, .depth = depth, .step = step, .out = g->out, .channels = g->out};
      p.a = (conv_is_matrix(g) ? x : patches) + first * step;
      p.kernel = kernel;
      p.y = y + first * g->out;
      p.after = *after;
      if (after->residual)
        p.after.residual = (const float *)after->residual + first * g->out;
      k->multiply(&p, panel);
    }
}
