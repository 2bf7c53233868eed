/* winograd.c: which convolutions go by Winograd's way, and the call of the kernels for the instruction set in use. */
#include "cpu/winograd.h"

#include <omp.h>

const winograd_kernels *winograd_kernels_for(cpu_isa isa) {
  static const winograd_kernels *const all[CPU_ISAS] = CPU_EACH_ISA(&, winograd);
  return cpu_isa_available(isa) ? all[isa] : NULL;
}

static const winograd_kernels *kernels(void) {
  return winograd_kernels_for(cpu_isa_used());
}

bool winograd_can(conv_direction direction, const conv_geometry *g) {
  bool can = g->dtype == OREPA_FLOAT32 && g->stride[0] <= (direction == CONV_BACKWARD_WEIGHT ? 2 : 1);
  for (int d = 0; d < 2; d++)
    can = can && g->kernel[d] == 3 && g->stride[d] == g->stride[0] && g->dilation[d] == 1;
  return can;
}

enum {
  LEAST_SIZE = 3,      /* of a map: smaller ones are mostly padding */
  LEAST_TILES = 40,    /* fewer don't repay the transformed kernel, */
  LEAST_IF_KEPT = 12,  /* or reading it */
  LEAST_CHANNELS = 16, /* a vector of them */
  LEAST_FOR_DATA = 24, /* the direct way is fast with few */
};

/* With stride 2 less is saved. */
enum {
  STRIDED_SIZE = 5,
  STRIDED_TILES = 48,
  STRIDED_CHANNELS = 32,
  STRIDED_WORK = 4096, /* tiles times channels */
};

/* Measured against the direct ways over 8 to 256 channels, maps of 2 to 56 pixels and batches of 1 to 128: where this
 * holds it is 1.1 to 3 times as fast. With stride 2, over 8 to 512 channels, maps of 5 to 112 pixels and batches of 1
 * to 64: 1.1 to 2 times. */
bool winograd_suits(conv_direction direction, const conv_geometry *g, bool kept) {
  bool strided = g->stride[0] == 2;
  const int64_t *made = direction == CONV_BACKWARD_DATA ? g->size : g->result;
  int64_t channels = g->in < g->out ? g->in : g->out, tiles = g->batch * ((made[0] + 3) / 4) * ((made[1] + 3) / 4);
  int64_t least = strided ? STRIDED_SIZE : LEAST_SIZE;
  if (!winograd_can(direction, g) || made[0] < least || made[1] < least)
    return false;
  if (strided)
    return tiles >= STRIDED_TILES && channels >= STRIDED_CHANNELS && tiles * channels >= STRIDED_WORK;
  return tiles >= (kept ? LEAST_IF_KEPT : LEAST_TILES) &&
         channels >= (direction == CONV_BACKWARD_DATA ? LEAST_FOR_DATA : LEAST_CHANNELS);
}

bool winograd_fuses_prologue(void) {
  return kernels()->rounds_once;
}

static int threads(void) {
  return omp_in_parallel() ? 1 : omp_get_max_threads();
}

size_t winograd_packed(const conv_geometry *g) {
  return kernels()->packed(g);
}

size_t winograd_scratch(conv_direction direction, const conv_geometry *g) {
  return direction == CONV_BACKWARD_WEIGHT ? kernels()->weight_scratch(g, threads())
                                           : kernels()->forward_scratch(direction, g, threads());
}

void winograd_conv(conv_direction direction, const winograd_operands *operands, void *scratch) {
  if (direction == CONV_BACKWARD_WEIGHT)
    kernels()->weight(operands, threads(), scratch);
  else
    kernels()->forward(direction, operands, threads(), scratch);
}
