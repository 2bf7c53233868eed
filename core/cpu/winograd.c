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

bool winograd_can(const conv_geometry *g) {
  bool can = g->dtype == OREPA_FLOAT32 && g->stride[0] <= 2;
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

/* With stride 2 less is saved. Tiles of outputs; channels of each map, both together have three times as many. */
enum {
  STRIDED_SIZE = 5,
  STRIDED_CHANNELS = 64,
  STRIDED_TILES = 200,
  STRIDED_IF_KEPT = 48,
  STRIDED_FOR_DATA = 100,
  STRIDED_FOR_WEIGHT = 48, /* from fewer channels on: */
  STRIDED_CHANNELS_FOR_WEIGHT = 32,
  STRIDED_IF_WIDE = 32, /* tiles for the weight gradient of as many pairs of channels as */
  STRIDED_WIDE = 256 * 256,
};

static int64_t tiles_of(const conv_geometry *g, const int64_t size[2]) {
  return g->batch * ((size[0] + 3) / 4) * ((size[1] + 3) / 4);
}

static bool is_at_least(const int64_t size[2], int64_t least) {
  return size[0] >= least && size[1] >= least;
}

/* Measured over 8 to 512 channels, maps of 5 to 112 pixels and batches of 1 to 64: where this holds it is mostly 1.1 to
 * 2 times as fast as the direct ways, and saves the norm's map beside that. */
static bool strided_suits(conv_direction direction, const conv_geometry *g, int64_t channels, bool kept) {
  bool weight = direction == CONV_BACKWARD_WEIGHT;
  int64_t least = weight ? STRIDED_CHANNELS_FOR_WEIGHT : STRIDED_CHANNELS;
  int64_t tiles = weight ? (g->in * g->out >= STRIDED_WIDE ? STRIDED_IF_WIDE : STRIDED_FOR_WEIGHT)
                  : direction == CONV_BACKWARD_DATA ? STRIDED_FOR_DATA
                  : kept                            ? STRIDED_IF_KEPT
                                                    : STRIDED_TILES;
  return is_at_least(g->result, STRIDED_SIZE) && channels >= least && g->in + g->out >= 3 * least &&
         tiles_of(g, g->result) >= tiles;
}

/* Measured against the direct ways over 8 to 256 channels, maps of 2 to 56 pixels and batches of 1 to 128: where this
 * holds it is 1.1 to 3 times as fast. */
bool winograd_suits(conv_direction direction, const conv_geometry *g, bool kept) {
  const int64_t *made = direction == CONV_BACKWARD_DATA ? g->size : g->result;
  int64_t channels = g->in < g->out ? g->in : g->out;
  if (!winograd_can(g))
    return false;
  if (g->stride[0] == 2)
    return strided_suits(direction, g, channels, kept);
  return is_at_least(made, LEAST_SIZE) && tiles_of(g, made) >= (kept ? LEAST_IF_KEPT : LEAST_TILES) &&
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
