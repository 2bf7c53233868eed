/* conv_ways.c: the choice, and the call. */
#include "cpu/conv_ways.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/conv_panels.h"
#include "cpu/features.h"
#include "cpu/onednn.h"
#include "cpu/winograd.h"

/* ---- which is the fastest ---- */

static struct {
  pthread_once_t once;
  bool winograd, direct;
} forced = {.once = PTHREAD_ONCE_INIT};

static void read_forced(void) {
  const char *way = getenv("OREPA_CONV");
  forced.winograd = way && !strcmp(way, "winograd");
  forced.direct = way && !strcmp(way, "direct");
}

static bool by_winograd(conv_direction direction, const conv_geometry *g, conv_wish wish) {
  pthread_once(&forced.once, read_forced);
  return winograd_can(g) && !wish.accurate && !forced.direct &&
         (forced.winograd || winograd_suits(direction, g, wish.kept));
}

enum { LEAST_RUN = 128 /* numbers side by side in a patch, from which gathering patches is cheap */ };

/* oneDNN's kernels for AVX-512 are as fast as a product. Those for AVX2 lose to it where they step over pixels and in
 * the weight gradient, unless the patches are crumbs (first layers, depthwise). */
conv_way conv_preferred(conv_direction direction, const conv_geometry *g, conv_wish wish) {
  if (g->dtype != OREPA_FLOAT32)
    return conv_gathered_suits(direction, g) ? BY_GATHERING : conv_folded_suits(direction, g) ? BY_FOLDING : BY_ONEDNN;
  if (by_winograd(direction, g, wish))
    return BY_WINOGRAD;
  if (conv_panels_suit(direction, g, wish.kept))
    return BY_PANELS;
  if (conv_positions_suit(direction, g))
    return BY_POSITIONS;
  bool strided = g->stride[0] > 1 || g->stride[1] > 1;
  bool lowers = cpu_isa_used() != CPU_AVX512 && g->groups == 1 && g->kernel[1] * g->in >= LEAST_RUN;
  return lowers && (strided || direction == CONV_BACKWARD_WEIGHT) ? BY_LOWERING : BY_ONEDNN;
}

/* ---- the choice ---- */

enum { PANELS_MARK = 0 }; /* oneDNN's are greater */

/* Groups and strides have their own forms of a kernel. */
static int64_t winograd_mark(const conv_geometry *g) {
  return -(2 * g->groups + g->stride[0] - 1);
}

/* By oneDNN, which may have a kernel for the bias alone. */
static device_status choose_onednn(conv_direction direction, const conv_geometry *g, int follows, conv_choice *choice) {
  onednn_needs needs = {0};
  choice->follows = follows;
  device_status status = onednn_conv_prepare(direction, g, follows, &needs);
  if (status == DEVICE_UNSUPPORTED && follows & ~FOLLOWED_BY_BIAS) {
    choice->follows = follows & FOLLOWED_BY_BIAS;
    status = onednn_conv_prepare(direction, g, choice->follows, &needs);
  }
  choice->way = BY_ONEDNN;
  choice->bytes = needs.scratch;
  choice->packed = needs.packed;
  choice->mark = needs.mark;
  return status;
}

/* float32 is lowered where oneDNN has nothing good. */
device_status conv_choose(conv_direction direction, const conv_geometry *g, int follows, conv_wish wish,
                          conv_choice *choice) {
  *choice = (conv_choice){.way = conv_preferred(direction, g, wish), .follows = follows & FOLLOWED_BY_BIAS};
  conv_way way = choice->way;
  device_status status = DEVICE_DONE;
  if (way == BY_GATHERING || way == BY_FOLDING) {
    status = way == BY_GATHERING ? conv_gathered_scratch(g, &choice->bytes) : conv_folded_scratch(g, &choice->bytes);
    if (status == DEVICE_UNSUPPORTED)
      status = choose_onednn(direction, g, follows, choice);
    return status;
  }
  if (way == BY_ONEDNN) {
    status = choose_onednn(direction, g, follows, choice);
    if (status != DEVICE_UNSUPPORTED || g->dtype != OREPA_FLOAT32)
      return status;
    *choice = (conv_choice){.way = way = BY_LOWERING, .follows = follows & FOLLOWED_BY_BIAS};
  }
  if (way == BY_WINOGRAD)
    *choice = (conv_choice){way, follows, winograd_scratch(direction, g), winograd_packed(g), winograd_mark(g)};
  else if (way == BY_PANELS)
    *choice = (conv_choice){way, follows, conv_panels_scratch(g), conv_panels_packed(g), PANELS_MARK};
  else
    choice->bytes = way == BY_POSITIONS ? conv_positions_scratch(direction, g) : conv_lowered_scratch(g);
  return DEVICE_DONE;
}

device_conv_fusion conv_way_fuses(conv_way way) {
  bool winograd = way == BY_WINOGRAD, prologue = winograd && winograd_fuses_prologue();
  return (device_conv_fusion){prologue, prologue, winograd};
}

/* ---- the call ---- */

device_status conv_run(const conv_choice *choice, const conv_call *c) {
  const conv_epilogue after = {c->after.bias, choice->follows & FOLLOWED_BY_RESIDUAL ? c->after.residual : NULL,
                               choice->follows & FOLLOWED_BY_RELU};
  const conv_operands operands = {c->g, c->x, c->w, c->y, after.bias};
  switch (choice->way) {
  case BY_WINOGRAD:
    winograd_conv(
        c->direction,
        &(winograd_operands){c->g, c->x, c->w, c->y, c->scale, c->shift, c->relu, after, c->moments, c->packed},
        c->scratch);
    return DEVICE_DONE;
  case BY_PANELS:
    conv_panels(c->g, c->x, c->w, c->y, &after, c->packed, c->scratch);
    return DEVICE_DONE;
  case BY_ONEDNN:
    return onednn_conv(c->direction, c->g, c->x, c->w, c->y, &after, c->packed, c->scratch);
  case BY_GATHERING:
    return conv_gathered(c->g, c->x, c->w, c->y, c->scratch);
  case BY_FOLDING:
    return conv_folded(c->g, c->x, c->w, c->y, c->scratch);
  case BY_POSITIONS:
    return conv_by_positions(c->direction, &operands, c->scratch);
  default:
    return conv_lowered(c->direction, &operands, c->scratch);
  }
}
